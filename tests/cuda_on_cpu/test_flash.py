"""The flash kernels' sources, run on the CPU: output, lse and every gradient against the reference in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from emulator import EmulatorRuntime, guarded
from torch import Tensor

from kernels.backend import Gradients, Operands
from kernels.cuda import flash
from kernels.problem import Axis, Problem
from kernels.reference import Reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TF32_TOLERANCE = 1e-3


def make_problem(
    *axes: Axis,
    dtype: torch.dtype = torch.float16,
    batch: int = 1,
    heads: int = 1,
    key_heads: int | None = None,
    head_dim: int = 16,
    value_dim: int | None = None,
    scale: float | None = None,
    additional: int = 0,
    rpb_dtype: torch.dtype | None = None,
) -> Problem:
    return Problem(
        batch=batch,
        axes=axes,
        heads=heads,
        key_heads=key_heads or heads,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        dtype=dtype,
        device=torch.device("cpu"),
        additional=additional,
        rpb_dtype=rpb_dtype,
    )


def make_operands(problem: Problem, *, packed: bool = False) -> Operands:
    torch.manual_seed(problem.tokens)

    def random(*shape: int) -> Tensor:
        return guarded(torch.randn(*shape).to(problem.dtype))

    lead = (problem.batch, *problem.space)
    if packed:
        query, key, value = random(*lead, 3, problem.heads, problem.head_dim).unbind(-3)
    else:
        query = random(*lead, problem.heads, problem.head_dim)
        key = random(*lead, problem.key_heads, problem.head_dim)
        value = random(*lead, problem.key_heads, problem.value_dim)
    rpb = None if problem.rpb_dtype is None else guarded(torch.randn(problem.rpb_shape).to(problem.rpb_dtype))
    extra_keys = extra_values = None
    if problem.additional:
        extra_keys = random(problem.batch, problem.additional, problem.key_heads, problem.head_dim)
        extra_values = random(problem.batch, problem.additional, problem.key_heads, problem.value_dim)
    return Operands(query, key, value, rpb, extra_keys, extra_values)


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    assert actual.isfinite().all(), f"{name}: not finite at {(~actual.isfinite()).nonzero()[:4].tolist()}"
    difference = actual.double() - expected
    error = float(difference.norm() / expected.norm().clamp_min(1e-9))
    # Per row too: one wrong row in a large map must not hide.
    scale = expected.norm(dim=-1).clamp_min(0.3 * float(expected.norm(dim=-1).mean()) + 1e-9)
    worst = difference.norm(dim=-1) / scale
    assert error < tolerance, f"{name}: {error:.2e} of {tolerance}, worst row {worst.argmax()} {float(worst.max()):.2e}"
    assert worst.max() < 10 * tolerance, f"{name}: row {worst.argmax()} is off by {float(worst.max()):.2e}"


def check(
    problem: Problem, *, operands: Operands | None = None, packed: bool = False, tolerance: float | None = None
) -> tuple[Tensor, Tensor, Gradients]:
    """Runs a problem forward and backward, lse's gradient included, and compares everything with the reference."""
    assert flash.why_not(problem) is None
    operands = operands or make_operands(problem, packed=packed)
    tolerance = tolerance or TOLERANCE[problem.dtype]
    exact = dataclasses.replace(problem, dtype=torch.float64, rpb_dtype=problem.rpb_dtype and torch.float64)
    doubles = Operands(*(None if t is None else t.double() for t in dataclasses.astuple(operands)))
    expected, expected_lse = Reference().forward(exact, doubles)

    output, lse = flash.forward(problem, operands)
    assert output.dtype == problem.dtype
    close("output", output, expected, tolerance)
    close("lse", lse, expected_lse, tolerance)

    grad_output = guarded(torch.randn(output.shape).to(problem.dtype))
    grad_lse = guarded(torch.randn(lse.shape))
    gradients = flash.backward(problem, operands, output, lse, grad_output, grad_lse, problem.has_rpb)
    wanted = Reference().backward(
        exact, doubles, expected, expected_lse, grad_output.double(), grad_lse.double(), problem.has_rpb
    )
    for field in dataclasses.fields(Gradients):
        actual, right, operand = (getattr(item, field.name) for item in (gradients, wanted, operands))
        if operand is None:
            assert actual is None
        else:
            assert actual.dtype == operand.dtype
            close(f"gradient of {field.name}", actual, right, 2 * tolerance)
    return output, lse, gradients


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    "axes",
    [
        (Axis(150, 33),),  # several tiles of queries and of keys, ragged at the end
        (Axis(70, 6, 3),),  # an even window; groups of different lengths
        (Axis(90, 9, stride=4),),
        (Axis(90, 40, causal=True),),
        (Axis(5, 5),),
        (Axis(19, 7), Axis(21, 5)),
        (Axis(16, 7, 2), Axis(9, 9)),
        (Axis(14, 4, 3, 2, True), Axis(13, 6, 2, 3)),
        (Axis(9, 3), Axis(7, 4), Axis(10, 5)),
        (Axis(6, 3, 2, causal=True), Axis(5, 2, stride=2), Axis(12, 3, 4)),
    ],
    ids=str,
)
def test_every_kind_of_window(emulator: EmulatorRuntime, axes: tuple[Axis, ...]) -> None:
    check(make_problem(*axes))
