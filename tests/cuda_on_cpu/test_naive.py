"""The naive kernels' sources, run on the CPU, against the reference in float64: forward and every gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulator import EmulatorRuntime
from materialised import (
    Case,
    assert_equals_reference,
    assert_repeats,
    case_named,
    every_case,
    problem_of,
    run,
    tensors_of,
)

from kernels.cuda import naive

pytestmark = pytest.mark.usefixtures("emulator")


@every_case
def test_equals_reference(case: Case) -> None:
    assert_equals_reference(case, "naive")


@pytest.mark.parametrize("label", ["2d_mixed_axes", "1d_even_window"])
def test_repeats_bit_for_bit(label: str) -> None:
    assert_repeats(case_named(label), "naive")


def test_operands_that_are_not_aligned_are_copied() -> None:
    case = case_named("1d_even_window")
    tensors = tensors_of(case)
    expected = run(case, tensors, "naive")
    for name in ("query", "key", "value"):
        tensor = getattr(tensors, name)
        shifted = torch.empty((*tensor.shape[:-1], tensor.shape[-1] + 1), dtype=tensor.dtype)[..., 1:]
        setattr(tensors, name, shifted.copy_(tensor))
    computed = run(case, tensors, "naive")
    for name, wanted in expected.items():
        assert torch.equal(computed[name], wanted), name


def test_says_why_it_does_not_serve(emulator: EmulatorRuntime) -> None:
    case = case_named("1d_even_window")
    serves = problem_of(case, tensors_of(case))
    assert naive.BACKEND.why_not(serves) is None
    for change, reason in (
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 6}, "head_dim 6 is not a multiple of 4"),
        ({"value_dim": 260}, "value_dim 260"),
        ({"dtype": torch.float16, "head_dim": 12}, "multiple of 8"),
        ({"device": torch.device("meta")}, "meta"),
    ):
        assert reason in (naive.BACKEND.why_not(dataclasses.replace(serves, **change)) or "")
