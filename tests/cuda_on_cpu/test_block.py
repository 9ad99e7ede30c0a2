"""The block kernels' sources, run on the CPU, against the reference in float64: both directions."""

from __future__ import annotations

import dataclasses
from dataclasses import astuple, replace

import pytest
import torch
from emulator import EmulatorRuntime, guarded
from torch import Tensor

from kernels import backend
from kernels.backend import Operands
from kernels.cuda import block
from kernels.problem import Axis, Problem
from kernels.reference import Reference

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_problem(
    window: tuple[int, ...],
    dilation: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 2,
    head_dim: int = 32,
    batch: int = 1,
    rpb_dtype: torch.dtype | None = torch.float32,
) -> Problem:
    return Problem(
        batch=batch,
        axes=tuple(Axis(k * d, k, d) for k, d in zip(window, dilation, strict=True)),
        heads=heads,
        key_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
        rpb_dtype=rpb_dtype,
    )


def make_operands(problem: Problem, *, packed: bool = False) -> Operands:
    torch.manual_seed(problem.tokens)
    if packed:
        qkv = torch.randn(problem.batch, *problem.space, 3, problem.heads, problem.head_dim)
        query, key, value = guarded(qkv.to(problem.dtype)).unbind(-3)
    else:
        shape = (problem.batch, *problem.space, problem.heads, problem.head_dim)
        query, key, value = (guarded(torch.randn(shape).to(problem.dtype)) for _ in range(3))
    rpb = None if problem.rpb_dtype is None else guarded(torch.randn(problem.rpb_shape).to(problem.rpb_dtype))
    return Operands(query, key, value, rpb)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative error; what ought to vanish (the gradients of a window of one key) is measured on a scale of 1e-3."""
    scale = max(float(expected.norm()), 1e-3 * expected.numel() ** 0.5)
    return float((actual.double() - expected).norm()) / scale


def assert_both_directions(problem: Problem, operands: Operands, *, with_grad_lse: bool = False) -> None:
    assert block.why_not(problem) is None
    tolerance = TOLERANCE[problem.dtype]
    exact = replace(problem, dtype=torch.float64, rpb_dtype=None if operands.rpb is None else torch.float64)
    doubles = Operands(*(None if t is None else t.double() for t in astuple(operands)))
    expected, expected_lse = Reference().forward(exact, doubles)

    output, lse = backend.forward(block, problem, operands)
    assert relative(output, expected) < tolerance
    worst = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert worst.max() < 4 * tolerance
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-3)

    grad_output = torch.randn_like(output.float()).to(problem.dtype)
    grad_lse = torch.randn_like(lse) if with_grad_lse else None
    grads = backend.backward(block, problem, operands, output, lse, grad_output, grad_lse, operands.rpb is not None)
    wanted = Reference().backward(
        exact,
        doubles,
        expected,
        expected_lse,
        grad_output.double(),
        None if grad_lse is None else grad_lse.double(),
        operands.rpb is not None,
    )
    for name in ("query", "key", "value", "rpb"):
        grad, reference = getattr(grads, name), getattr(wanted, name)
        if reference is None:
            assert grad is None
            continue
        operand = getattr(operands, name)
        assert grad.dtype == operand.dtype
        assert grad.shape == operand.shape
        assert relative(grad, reference) < 2 * tolerance, name


@pytest.mark.parametrize(
    ("window", "dilation", "batch"),
    [
        ((7, 7), (1, 1), 3),
        ((7, 7), (2, 1), 2),
        ((7, 7), (2, 3), 1),
        ((8, 8), (1, 1), 1),  # no padding
        ((3, 5), (2, 2), 2),  # one warp
        ((4, 6), (1, 3), 1),
        ((33,), (3,), 2),
        ((2, 3, 4), (2, 1, 2), 1),
        ((1, 1), (3, 2), 1),
    ],
)
def test_windows_and_dilations(
    emulator: EmulatorRuntime, window: tuple[int, ...], dilation: tuple[int, ...], batch: int
) -> None:
    problem = make_problem(window, dilation, batch=batch)
    assert_both_directions(problem, make_operands(problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rpb_dtype", [None, torch.float16])
def test_dtypes_packed_qkv_and_lse_gradient(
    emulator: EmulatorRuntime, dtype: torch.dtype, rpb_dtype: torch.dtype | None
) -> None:
    problem = make_problem((7, 7), (1, 2), dtype=dtype, rpb_dtype=rpb_dtype)
    assert_both_directions(problem, make_operands(problem, packed=True), with_grad_lse=True)


def test_head_dim_64(emulator: EmulatorRuntime) -> None:
    problem = make_problem((7, 7), (1, 1), head_dim=64, heads=1, batch=2)
    assert_both_directions(problem, make_operands(problem))


def test_more_items_than_a_warp_has_lanes(emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        emulator, "_properties", dataclasses.replace(emulator.properties(torch.device("cpu")), multiprocessors=1)
    )
    problem = make_problem((2, 2), (5, 7), batch=2, heads=3)
    block._prepared_forward.cache_clear()
    block._prepared_backward.cache_clear()
    assert_both_directions(problem, make_operands(problem))


def test_transposed_grad_output(emulator: EmulatorRuntime) -> None:
    problem = make_problem((4, 4), (2, 1))
    operands = make_operands(problem)
    output, lse = backend.forward(block, problem, operands)
    grad_output = torch.randn(1, problem.heads, *problem.space, 32).to(problem.dtype).permute(0, 2, 3, 1, 4)
    strided = backend.backward(block, problem, operands, output, lse, grad_output, None, True)
    contiguous = backend.backward(block, problem, operands, output, lse, grad_output.contiguous(), None, True)
    assert all(torch.equal(a, b) for a, b in zip(astuple(strided)[:4], astuple(contiguous)[:4], strict=True))


def test_same_bits_twice(emulator: EmulatorRuntime) -> None:
    problem = make_problem((7, 7), (2, 2))
    operands = make_operands(problem)
    output, lse = backend.forward(block, problem, operands)
    grad_output = torch.randn_like(output.float()).to(problem.dtype)
    first, second = (backend.backward(block, problem, operands, output, lse, grad_output, None, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(astuple(first)[:4], astuple(second)[:4], strict=True))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"axes": (Axis(15, 7, 2), Axis(14, 7, 2))}, "whole dilation group"),
        ({"axes": (Axis(14, 7, 2, causal=True), Axis(14, 7, 2))}, "whole dilation group"),
        ({"axes": (Axis(9, 9), Axis(9, 9))}, "64 tokens"),
        ({"dtype": torch.float32}, "float16"),
        ({"head_dim": 40, "value_dim": 40}, "head dims"),
        ({"key_heads": 1}, "key heads"),
        ({"additional": 3}, "additional"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_refusals_say_why(change: dict[str, object], word: str) -> None:
    reason = block.why_not(replace(make_problem((7, 7), (2, 2)), **change))
    assert reason is not None
    assert word in reason
