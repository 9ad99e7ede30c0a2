"""The published operators' answers (tests/golden/na_vectors.*), given by every CUDA backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_problems import TOLERANCES
from torch import Tensor

from kernels import neighborhood_attention

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "na_vectors.json").read_text())


BACKENDS = ("naive", "gemm", "fused")
NAMES = ("out", "lse", "dq", "dk", "dv", "drpb")


def answers(case: dict[str, Any], dtype: torch.dtype, backend: str, device: torch.device) -> dict[str, Tensor]:
    """Output, lse and all gradients by the names they have in the file; the inputs are made by seed."""
    rng = np.random.RandomState(case["seed"])
    shape = (case["batch"], *case["shape"], case["heads"], case["dim"])

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(device, dtype)

    query, key, value, grad_output = (normal(shape) for _ in range(4))
    operands = [query, key, value]
    if case["rpb"]:
        operands.append(normal((case["heads"], *(2 * k - 1 for k in case["k"]))))
    for operand in operands:
        operand.requires_grad_()
    output, lse = neighborhood_attention(
        *operands[:3],
        case["k"],
        dilation=case["d"],
        is_causal=case["causal"],
        rpb=operands[3] if case["rpb"] else None,
        scale=case["scale"],
        return_lse=True,
        backend=backend,
    )
    return dict(zip(NAMES, [output, lse, *torch.autograd.grad(output, operands, grad_output)], strict=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_golden_vectors(cuda, index, dtype, backend):
    results = answers(CASES[index], dtype, backend, cuda)
    with np.load(GOLDEN / "na_vectors.npz") as vectors:
        for name, result in results.items():
            expected = torch.from_numpy(vectors[f"{index}/{name}"]).double()
            error = (result.detach().cpu().double() - expected).norm() / expected.norm()
            # The inputs are rounded too: that alone moves the answer by up to the tolerance.
            limit = (1 if dtype == torch.float32 else 2) * TOLERANCES[dtype]
            assert error <= limit, f"{name}: {error:.2e} of {limit:.0e}"
