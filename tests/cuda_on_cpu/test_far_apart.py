"""Tensors whose tokens lie further apart than 2^31 elements, as those of a large tensor do: offsets need 64 bits.

They lie in sparse files: of tens of gigabytes, only the pages of a few tokens are ever there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator import EmulatorRuntime
from materialised import TOLERANCE
from torch import Tensor

from kernels import neighborhood_attention
from kernels.cuda.runtime import use_runtime

FAR = 2**31 + 64  # elements from a token to the next


def apart(tensor: Tensor, axis: int, file: Path) -> Tensor:
    """The same numbers, FAR elements between neighbours along `axis` and more than that along the axes before it."""
    strides = list(tensor.contiguous().stride())
    for outer in range(axis, -1, -1):
        strides[outer] = FAR if outer == axis else strides[outer + 1] * tensor.shape[outer + 1]
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    memory = torch.from_file(str(file), shared=True, size=span, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("backend", ["naive", "gemm", "fused"])
@pytest.mark.parametrize(
    ("space", "window", "axis", "dtype", "head_dim"),
    [
        ((5,), (3,), 0, torch.float32, 8),
        ((5,), (3,), 1, torch.float32, 8),
        ((2, 2), (2, 2), 1, torch.float16, 32),
        ((3, 2), (2, 2), 1, torch.float16, 32),
        ((2, 4), (2, 3), 2, torch.bfloat16, 32),
        ((2, 2, 3), (2, 1, 2), 1, torch.float16, 8),
    ],
)
def test_offsets_have_64_bits(
    backend: str,
    space: tuple[int, ...],
    window: tuple[int, ...],
    axis: int,
    dtype: torch.dtype,
    head_dim: int,
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(2, *space, 2, head_dim, generator=generator).to(dtype) for _ in range(4)]
    far = [apart(tensor, axis, tmp_path / str(index)) for index, tensor in enumerate(near)]
    results = []
    for query, key, value, grad_output in (near, far):
        operands = [tensor.requires_grad_() for tensor in (query, key, value)]
        with use_runtime("cpu", EmulatorRuntime()):
            output = neighborhood_attention(*operands, window, backend=backend)
            results.append([output, *torch.autograd.grad(output, operands, grad_output)])
    for expected, actual in zip(*results, strict=True):
        assert (actual.double() - expected.double()).norm() <= 2 * TOLERANCE[dtype] * expected.double().norm()
