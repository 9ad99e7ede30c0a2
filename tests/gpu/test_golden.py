"""The published operators' answers (tests/golden/na_vectors.*), given by every CUDA backend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from random_problems import TOLERANCES
from torch import Tensor

from kernels import neighborhood_attention

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "na_vectors.json").read_text())


@pytest.mark.parametrize("backend", ["naive", "gemm", "fused"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_golden_vectors(cuda, index, dtype, backend):
    """Inputs by seed, answers from tests/golden."""
    case = CASES[index]
    rng = np.random.RandomState(case["seed"])
    shape = (case["batch"], *case["shape"], case["heads"], case["dim"])

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(cuda, dtype)

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
    results = [output, lse, *torch.autograd.grad(output, operands, grad_output)]
    with np.load(GOLDEN / "na_vectors.npz") as vectors:
        for name, result in zip(("out", "lse", "dq", "dk", "dv", "drpb"), results, strict=False):
            expected = torch.from_numpy(vectors[f"{index}/{name}"]).double()
            error = (result.detach().cpu().double() - expected).norm() / expected.norm()
            # The inputs are rounded too: that alone moves the answer by up to the tolerance.
            limit = (1 if dtype == torch.float32 else 2) * TOLERANCES[dtype]
            assert error <= limit, f"{name}: {error:.2e} of {limit:.0e}"
