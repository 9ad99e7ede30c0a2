"""The fused backend end to end on the CPU: through the public operator and autograd, whichever family serves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulator import EmulatorRuntime, guarded, guarded_allocations

from kernels import neighborhood_attention
from kernels.cuda import block, flash, fused, strip, strip_backward
from kernels.problem import Axis, Problem


def make_problem(*axes: Axis, **changes: object) -> Problem:
    base = Problem(1, axes, 2, 2, 32, 32, 32**-0.5, torch.float16, torch.device("cpu"), rpb_dtype=torch.float32)
    return dataclasses.replace(base, **changes)


def test_the_first_family_that_serves_is_taken(emulator: EmulatorRuntime) -> None:
    dense = make_problem(Axis(14, 7, 2), Axis(14, 7, 2))
    sliding = make_problem(Axis(14, 7), Axis(14, 7))
    anything = make_problem(Axis(14, 7, causal=True), Axis(14, 7), dtype=torch.float32)
    assert fused.forward_families(dense)[0] is block
    assert fused.forward_families(sliding)[0] is strip
    assert fused.backward_families(sliding, True)[0] is strip_backward
    assert fused.forward_families(anything) == fused.backward_families(anything, False) == (flash,)


@pytest.mark.parametrize(
    ("axes", "dtype", "tolerance"),
    [
        (((9, 5, 1), (8, 4, 2)), torch.float32, 1e-5),
        (((14, 7, 2), (14, 7, 2)), torch.float16, 4e-3),
        (((9, 7, 1), (10, 7, 1)), torch.bfloat16, 2e-2),
    ],
)
def test_operator_and_autograd(
    emulator: EmulatorRuntime, axes: tuple[tuple[int, int, int], ...], dtype: torch.dtype, tolerance: float
) -> None:
    space, window, dilation = zip(*axes, strict=True)
    torch.manual_seed(0)
    qkv = torch.randn(2, *space, 3, 2, 32).to(dtype)
    rpb = torch.randn(2, *(2 * k - 1 for k in window))
    grad = torch.randn(2, *space, 2, 32).to(dtype)

    def run(backend: str, convert: torch.dtype) -> list[torch.Tensor]:
        packed = qkv.detach().to(convert, copy=True).requires_grad_()
        bias = rpb.to(torch.promote_types(convert, rpb.dtype), copy=True).requires_grad_()
        query, key, value = packed.unbind(-3)
        output = neighborhood_attention(query, key, value, window, dilation=dilation, rpb=bias, backend=backend)
        output.backward(grad.to(convert))
        assert packed.grad is not None
        assert bias.grad is not None
        return [output.detach(), packed.grad, bias.grad]

    for actual, expected in zip(run("fused", dtype), run("reference", torch.float64), strict=True):
        assert (actual.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("backend", ["naive", "gemm", "fused"])
@pytest.mark.parametrize("offset", [0, 1])
def test_expanded_and_unaligned_operands_beside_guard_pages(
    emulator: EmulatorRuntime, backend: str, offset: int
) -> None:
    """Strides of zero along batch, heads and space; rows that start at odd elements. Nothing outside is touched."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        padded = torch.randn((*shape[:-1], shape[-1] + offset), generator=generator).half()
        return guarded(padded, at="start" if offset else "end")[..., offset:]

    leaves = [normal(1, 14, 14, 2, 32), normal(2, 14, 14, 1, 32), normal(2, 14, 1, 2, 32)]
    grad = normal(1, 1, 14, 2, 32).expand(2, 14, 14, 2, 32)

    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        operands = [leaf.expand(2, 14, 14, 2, 32) for leaf in inputs]
        output = neighborhood_attention(*operands, 7, dilation=2, backend=backend)
        return [output, *torch.autograd.grad(output, inputs, grad.to(dtype))]

    expected = run("reference", torch.float64)
    with guarded_allocations():
        actual = run(backend, torch.float16)
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() <= 4e-3 * e.norm()
