"""The flash kernels' sources, run on the CPU: output, lse and every gradient against the reference in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from emulator import EmulatorRuntime, guarded
from torch import Tensor

from kernels import backend
from kernels.backend import Gradients, Operands
from kernels.cuda import flash
from kernels.cuda.arguments import alignment
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

    output, lse = backend.forward(flash, problem, operands)
    assert output.dtype == problem.dtype
    close("output", output, expected, tolerance)
    close("lse", lse, expected_lse, tolerance)

    grad_output = guarded(torch.randn(output.shape).to(problem.dtype))
    grad_lse = guarded(torch.randn(lse.shape))
    gradients = backend.backward(flash, problem, operands, output, lse, grad_output, grad_lse, problem.has_rpb)
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


RPB = torch.float32
PLANE = (Axis(11, 5), Axis(13, 6, 2))


@pytest.mark.parametrize(
    ("dtype", "rpb_dtype"), [(torch.float32, RPB), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)]
)
def test_bias(emulator: EmulatorRuntime, dtype: torch.dtype, rpb_dtype: torch.dtype) -> None:
    check(make_problem(*PLANE, dtype=dtype, rpb_dtype=rpb_dtype, heads=2, batch=2))


def test_bias_in_one_and_three_dimensions(emulator: EmulatorRuntime) -> None:
    check(make_problem(Axis(80, 10, stride=3, causal=True), dtype=torch.float32, rpb_dtype=RPB))
    check(make_problem(Axis(5, 3), Axis(8, 4, 2), Axis(7, 4, stride=2), rpb_dtype=RPB))


def test_bias_too_large_for_shared_memory(emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cuda.flash_plan.BIAS_LIMIT", 64)
    check(make_problem(*PLANE, rpb_dtype=RPB, heads=2, batch=3))


@pytest.mark.parametrize("at", ["start", "end"])
def test_no_bias_is_read_for_rows_behind_the_last_token(
    emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Every token of the last tile's rows sees whole tiles of columns; but the tile has rows that are no token."""
    monkeypatch.setattr("kernels.cuda.flash_plan.BIAS_LIMIT", 0)
    problem = make_problem(Axis(40, 40), dtype=torch.float32, head_dim=128, rpb_dtype=RPB)
    operands = make_operands(problem)
    assert operands.rpb is not None
    check(problem, operands=dataclasses.replace(operands, rpb=guarded(operands.rpb, at)))


def test_tf32_only_where_torch_allows_it(emulator: EmulatorRuntime, tf32: None) -> None:
    problem = make_problem(*PLANE, dtype=torch.float32, head_dim=24, rpb_dtype=RPB)
    output, _, _ = check(problem, tolerance=TF32_TOLERANCE)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    exact, _, _ = check(problem)
    assert not torch.equal(output, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_heads_and_additional_keys(emulator: EmulatorRuntime, dtype: torch.dtype) -> None:
    check(make_problem(*PLANE, dtype=dtype, heads=4, key_heads=2, additional=70, batch=2, rpb_dtype=RPB))


def test_additional_keys_in_two_launches(emulator: EmulatorRuntime) -> None:
    check(make_problem(Axis(9, 3), Axis(12, 4), dtype=torch.float32, head_dim=256, additional=20))


def test_additional_keys_in_one_dimension(emulator: EmulatorRuntime) -> None:
    check(make_problem(Axis(50, 7, 3, causal=True), additional=3))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        (torch.float16, 8, 40),
        (torch.float16, 128, 128),
        (torch.float16, 256, 200),
        (torch.float32, 4, 20),
        (torch.float32, 68, 96),
        (torch.float32, 256, 256),
    ],
)
def test_head_dims(emulator: EmulatorRuntime, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    check(make_problem(Axis(9, 3), Axis(10, 4), dtype=dtype, head_dim=head_dim, value_dim=value_dim))


def test_packed_qkv_is_read_in_place(emulator: EmulatorRuntime) -> None:
    check(make_problem(*PLANE, heads=3, head_dim=24, batch=2), packed=True)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_any_alignment(emulator: EmulatorRuntime, offset: int) -> None:
    problem = make_problem(Axis(20, 5), heads=2)
    shape = (1, 20, 2, 16)
    torch.manual_seed(offset)
    storage = guarded(torch.randn(3, 20 * 2 * 16 + offset).half())
    assert alignment(*(row[offset:].view(shape) for row in storage)) == 2 * offset
    check(problem, operands=Operands(*(row[offset:].view(shape) for row in storage)))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_unusual_scales(emulator: EmulatorRuntime, scale: float) -> None:
    check(make_problem(*PLANE, scale=scale, dtype=torch.float32, rpb_dtype=RPB))


def test_gradients_are_the_same_bits_twice(emulator: EmulatorRuntime) -> None:
    problem = make_problem(*PLANE, rpb_dtype=RPB, additional=5, heads=2, batch=2)
    operands = make_operands(problem)
    output, lse = backend.forward(flash, problem, operands)
    grad = torch.randn(output.shape).half()
    first, second = (backend.backward(flash, problem, operands, output, lse, grad, None, True) for _ in range(2))
    for one, two in zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True):
        assert torch.equal(one, two)


def test_large_scores_do_not_overflow(emulator: EmulatorRuntime) -> None:
    problem = make_problem(Axis(40, 9), dtype=torch.float32, scale=30.0)
    output, lse, _ = check(problem, tolerance=1e-4)
    assert lse.abs().max() > 100
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(12, torch.float16), (6, torch.float32), (264, torch.float32), (16, torch.float64)]
)
def test_what_is_not_served_is_said(head_dim: int, dtype: torch.dtype) -> None:
    reason = flash.why_not(make_problem(Axis(8, 3), head_dim=head_dim, dtype=dtype))
    assert reason is not None
    assert str(dtype) in reason
