"""The forward kernel of hopper_strip, run on the CPU, against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulator import EmulatorRuntime
from test_strip_forward import TOLERANCE, make_operands, make_problem

from kernels import backend
from kernels.backend import Operands
from kernels.cuda import hopper_strip
from kernels.problem import Problem
from kernels.reference import Reference


def assert_forward(problem: Problem, operands: Operands) -> None:
    assert hopper_strip.why_not_operands(problem, operands) is None
    output, lse = backend.forward(hopper_strip, problem, operands)
    exact = dataclasses.replace(problem, dtype=torch.float64, rpb_dtype=None if operands.rpb is None else torch.float64)
    doubles = Operands(*(None if t is None else t.double() for t in dataclasses.astuple(operands)))
    expected, expected_lse = Reference().forward(exact, doubles)
    assert output.dtype == problem.dtype
    assert output.is_contiguous()
    # Per query: one wrong row in a large map must not hide.
    error = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 4 * TOLERANCE[problem.dtype], f"at {error.isnan().nonzero()[:5]}, {error.argmax()}"
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[problem.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("space", [(14, 14), (16, 28), (24, 12)])
def test_borders(emulator: EmulatorRuntime, space: tuple[int, int]) -> None:
    problem = make_problem(space, (7, 7))
    assert_forward(problem, make_operands(problem))
