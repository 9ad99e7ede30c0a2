"""Gradients of packed projections on CUDA: the same bits as those of three tensors, call after call, and in graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import na2d
from kernels.packing import are_slices, unbind

CASES = [
    (28, 4, 32, 7, 1),
    (56, 2, 32, 7, 8),
    (14, 8, 32, 7, 1),
    (14, 8, 32, 7, 2),
    (28, 4, 32, 11, 1),
    (14, 12, 64, 7, 1),
]


def gradients(slices: tuple[Tensor, ...], rpb: Tensor, window: int, dilation: int, grad: Tensor) -> tuple[Tensor, ...]:
    output = na2d(*slices, window, dilation=dilation, rpb=rpb)
    return torch.autograd.grad(output, (*slices, rpb), grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "heads", "head_dim", "window", "dilation"), CASES)
def test_equal_those_of_three_tensors(cuda, length, heads, head_dim, window, dilation, dtype):
    shape = (64, length, length, 3, heads, head_dim)
    packed = torch.randn(shape, device=cuda).to(dtype).requires_grad_()
    rpb = torch.randn(heads, 2 * window - 1, 2 * window - 1, device=cuda).requires_grad_()
    grad = torch.randn(64, length, length, heads, head_dim, device=cuda).to(dtype)
    alone = tuple(slice_.detach().contiguous().requires_grad_() for slice_ in packed.unbind(-3))
    wanted = gradients(alone, rpb, window, dilation, grad)
    for _ in range(3):
        slices = unbind(packed)
        found = gradients(slices, rpb, window, dilation, grad)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert are_slices(*found[:3])
    output = na2d(*unbind(packed), window, dilation=dilation, rpb=rpb)
    (whole,) = torch.autograd.grad(output, packed, grad)
    assert whole.is_contiguous()
    assert torch.equal(whole, torch.stack(wanted[:3], -3))
