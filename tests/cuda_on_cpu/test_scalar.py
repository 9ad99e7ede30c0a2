"""The scalar kernel's source, run on the CPU, against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulator import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend
from kernels.backend import Operands
from kernels.cuda import fused, scalar
from kernels.problem import Axis, Problem
from kernels.reference import Reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make_problem(*axes: Axis, dtype=torch.float32, heads=2, key_heads=None, head_dim=32, batch=1, rpb=torch.float32):
    return Problem(
        batch=batch,
        axes=axes,
        heads=heads,
        key_heads=key_heads or heads,
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
        rpb_dtype=rpb,
    )


def make_operands(problem: Problem, seed: int = 0, factor: float = 1.0) -> Operands:
    """Slices of one packed tensor where heads allow it, each behind guards."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return guarded((factor * torch.randn(*shape, generator=generator)).to(dtype))

    tokens = (problem.batch, *problem.space)
    if problem.key_heads == problem.heads:
        query, key, value = normal(*tokens, 3, problem.heads, problem.head_dim).unbind(-3)
    else:
        query = normal(*tokens, problem.heads, problem.head_dim)
        key, value = (normal(*tokens, problem.key_heads, problem.head_dim) for _ in range(2))
    rpb = None if problem.rpb_dtype is None else normal(*problem.rpb_shape, dtype=problem.rpb_dtype)
    return Operands(query, key, value, rpb)


def assert_forward(problem: Problem, operands: Operands) -> None:
    assert scalar.why_not(problem) is None
    assert scalar.why_not_operands(problem, operands) is None
    output, lse = backend.forward(scalar, problem, operands)
    exact = dataclasses.replace(problem, dtype=torch.float64, rpb_dtype=problem.rpb_dtype and torch.float64)
    doubles = Operands(*(None if t is None else t.double() for t in dataclasses.astuple(operands)))
    expected, expected_lse = Reference().forward(exact, doubles)
    assert output.dtype == problem.dtype
    assert output.is_contiguous()
    # Per query: one wrong row in a large map must not hide.
    error = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 4 * TOLERANCE[problem.dtype], f"at {error.isnan().nonzero()[:5]}, {error.argmax()}"
    torch.testing.assert_close(lse.double(), expected_lse, atol=3e-6, rtol=3e-6)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    "problem",
    [
        make_problem(Axis(14, 7), Axis(15, 7)),
        make_problem(Axis(7, 7), Axis(7, 7), batch=3),  # several maps in a tile
        make_problem(Axis(16, 7, 2), Axis(15, 7, 2), rpb=None),  # groups of two lengths
        make_problem(Axis(9, 3), Axis(37, 4), heads=4, key_heads=2),  # several tiles along a row, even windows
        make_problem(Axis(13, 11), Axis(13, 13), rpb=torch.float32),
        make_problem(Axis(6, 5), Axis(9, 5), head_dim=64),
        make_problem(Axis(6, 5), Axis(9, 3), head_dim=20),  # some lanes hold a chunk less
        make_problem(Axis(5, 3), Axis(4, 2, 2), Axis(9, 5)),
        make_problem(Axis(70, 5, 3, 1, True), batch=2),
        make_problem(Axis(150, 5, 12), dtype=torch.bfloat16, head_dim=24, rpb=torch.bfloat16),
        make_problem(Axis(150, 9), dtype=torch.float16, head_dim=64, rpb=None),
        make_problem(Axis(64, 5), head_dim=12, rpb=None),
        make_problem(Axis(3, 2), Axis(3, 2)),  # fewer columns than queries of a group
    ],
    ids=lambda p: f"{p.space} {p.window} {p.dilation} {p.head_dim} {p.dtype}",
)
def test_equals_reference(problem):
    assert_forward(problem, make_operands(problem))


def axes_of(windows: list[int], longest: int) -> st.SearchStrategy[Axis]:
    window, dilation = st.sampled_from(windows), st.integers(1, 3)
    return st.builds(lambda more, k, d: Axis(k * d + more, k, d), st.integers(0, longest), window, dilation)


@pytest.mark.usefixtures("emulator")
@settings(max_examples=25, deadline=None)
@given(
    outer=st.lists(axes_of([1, 2, 3, 5], 5), max_size=2),
    last=axes_of([1, 4, 7], 20),  # which decides, with head_dim and bias, over the kernel
    is_causal=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3)]),
    head_dim=st.sampled_from([12, 40]),
    rpb=st.sampled_from([None, torch.float32]),
    batch=st.integers(1, 2),
)
def test_random_problems(outer, last, is_causal, heads, head_dim, rpb, batch):
    last = dataclasses.replace(last, causal=is_causal)
    sizes = {"heads": heads[0], "key_heads": heads[1], "head_dim": head_dim, "batch": batch}
    problem = make_problem(*outer, last, rpb=rpb, **sizes)
    assert_forward(problem, make_operands(problem))


@pytest.mark.usefixtures("emulator")
def test_large_scores():
    """Whose largest rises from row to row by more than sums may lag behind, and others that only sink."""
    problem = make_problem(Axis(12, 7), Axis(12, 7))
    operands = make_operands(problem, factor=6.0)
    assert_forward(problem, operands)
    operands.key[..., :] *= torch.linspace(0.1, 3, 12).view(1, 12, 1, 1, 1)
    assert_forward(problem, operands)


@pytest.mark.usefixtures("emulator")
def test_what_no_query_sees_changes_nothing():
    problem = make_problem(Axis(9, 3), Axis(20, 3))
    operands = make_operands(problem)
    expected, _ = backend.forward(scalar, problem, operands)
    operands.key[:, 8] = operands.value[:, 8] = float("nan")  # seen by rows 7 and 8
    found, _ = backend.forward(scalar, problem, operands)
    assert torch.equal(found[:, :7], expected[:, :7])
    assert found[:, 7:].isnan().all()


def test_what_is_served():
    assert fused.forward_families(make_problem(Axis(56, 7), Axis(56, 7)))[0] is scalar
    assert fused.forward_families(make_problem(Axis(256, 5), dtype=torch.bfloat16))[0] is scalar
    refused = [
        (make_problem(Axis(56, 7), Axis(56, 7), dtype=torch.bfloat16), "sequences"),
        (make_problem(Axis(256, 11), dtype=torch.bfloat16), "at most 9 keys"),
        (make_problem(Axis(256, 5), dtype=torch.bfloat16, head_dim=16), "head dims from 24"),
        (make_problem(Axis(56, 15), Axis(56, 15)), "windows up to 13"),
        (make_problem(Axis(56, 7), Axis(56, 7), head_dim=128), "head dims up to 64"),
        (make_problem(Axis(56, 7), head_dim=30), "by 16 bytes"),
        (make_problem(Axis(56, 7, 1, 2), Axis(56, 7)), "no stride"),
        (make_problem(Axis(56, 7, 1, 1, True), Axis(56, 7)), "causal masking along the last axis"),
        (make_problem(Axis(56, 13), Axis(56, 13), Axis(56, 13)), "a bias of at most"),
    ]
    for problem, reason in refused:
        assert reason in scalar.why_not(problem)


def test_tf32_where_it_is_allowed(monkeypatch):
    problem = make_problem(Axis(9, 3), Axis(9, 3))
    monkeypatch.setattr(scalar, "allows_tf32", lambda: True)
    assert "TF32" in scalar.why_not_operands(problem, make_operands(problem))
