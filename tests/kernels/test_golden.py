"""Answers of the published CPU operators, version 0.17.5 (with bias), to inputs rebuilt from seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import neighborhood_attention

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "na_vectors.json").read_text())
ANSWERS = np.load(GOLDEN / "na_vectors.npz")


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_published_answers(index: int, backend: str) -> None:
    case: dict[str, Any] = CASES[index]
    random = np.random.RandomState(case["seed"])
    shape = (case["batch"], *case["shape"], case["heads"], case["dim"])
    query, key, value, grad_output = (torch.from_numpy(random.standard_normal(shape)) for _ in range(4))
    leaves = {"dq": query, "dk": key, "dv": value}
    rpb = None
    if case["rpb"]:
        rpb = leaves["drpb"] = torch.from_numpy(
            random.standard_normal((case["heads"], *(2 * k - 1 for k in case["k"])))
        )
    for leaf in leaves.values():
        leaf.requires_grad_()
    output, lse = neighborhood_attention(
        query,
        key,
        value,
        case["k"],
        dilation=case["d"],
        is_causal=case["causal"],
        rpb=rpb,
        scale=case["scale"],
        return_lse=True,
        backend=backend,
    )
    output.backward(grad_output)
    found = {"out": output.detach(), "lse": lse.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), ANSWERS[f"{index}/{name}"], rtol=0, atol=1e-6, err_msg=name)
