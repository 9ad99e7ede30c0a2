"""Kernel family `flash`: fused neighborhood attention, forward and backward, for every problem.

Scores never leave the chip. Rows of a tile are a box of queries (of keys, for the gradients of key and value) inside
one dilation group; tiles of what they see stream past them. See src/flash_*.cuh; flash_plan.py chooses the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels.backend import BoundBackward, BoundForward, Gradients, Operands
from kernels.cuda import bound, flash_launch
from kernels.cuda.arguments import address, aligned, alignment, allows_tf32
from kernels.cuda.flash_launch import Strides
from kernels.cuda.flash_plan import (
    arithmetic_of,
    key_gradient_passes,
    plan_forward,
    plan_key_gradient,
    plan_query_gradient,
)
from kernels.cuda.jit import KernelSource
from kernels.problem import Axis, Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`, in one sentence; None if it does."""
    if problem.dtype not in DTYPES:
        return f"flash computes in float32, float16 and bfloat16; this is {problem.dtype}."
    multiple = 4 if problem.dtype == torch.float32 else 8
    for name, dim in (("head_dim", problem.head_dim), ("value_dim", problem.value_dim)):
        if dim % multiple or not 0 < dim <= MAX_DIM:
            return f"flash takes multiples of {multiple} up to {MAX_DIM} for {name} in {problem.dtype}; it is {dim}."
    if problem.rpb_dtype is not None and problem.rpb_dtype not in DTYPES:
        return f"flash takes a bias in float32, float16 or bfloat16; this is {problem.rpb_dtype}."
    return None


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """Of problems that `why_not` accepts. See kernels.backend.bind_forward."""
    return bound.forward(problem, flash_launch.forward_launch(*_layout(problem, operands)).bind(problem.device))


def bind_backward(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> BoundBackward:
    """Of problems that `why_not` accepts; the same bits every time. See kernels.backend.bind_backward."""
    query_gradient = bind_query_gradient(problem, operands, grad_output, needs_rpb_grad)
    key_gradients = bind_key_gradients(problem, operands, grad_output)
    additional_gradients = bind_additional_gradients(problem, operands, grad_output) if problem.additional else None

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        operands = (query, key, value, rpb, additional_keys, additional_values)
        lse = lse.contiguous()
        grad_query, grad_rpb, delta = query_gradient(*operands, output, lse, grad_output, grad_lse)
        grad_key, grad_value = key_gradients(query, key, value, rpb, lse, delta, grad_output)
        additional: tuple[Tensor, ...] = ()
        if additional_gradients is not None:
            additional = additional_gradients(query, additional_keys, additional_values, lse, delta, grad_output)
        return Gradients(grad_query, grad_key, grad_value, grad_rpb, *additional)

    return call


def bind_query_gradient(
    problem: Problem, operands: Operands, grad_output: Tensor, needs_rpb_grad: bool
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    """Of what a bound backward pass is given: gradients of query and, where wanted, of the bias; and delta, as lse."""
    planned = flash_launch.query_gradient_launch(*_layout(problem, operands, grad_output), needs_rpb_grad)
    launch = planned.bind(problem.device)
    new_gradient, _, _ = bound.new_gradients(problem)
    _, new_delta = bound.new_results(problem)
    partials_shape = (planned.parts, *problem.rpb_shape)

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        output, lse = aligned(output.contiguous()), lse.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        rpb = None if rpb is None else rpb.contiguous()
        grad_query, delta = new_gradient(), new_delta()
        partials = query.new_zeros(partials_shape, dtype=torch.float32) if needs_rpb_grad else None
        read = (query, key, value, additional_keys, additional_values, output, lse, grad_output, grad_lse)
        launch(*map(address, (*read, grad_query, delta, rpb, partials)))
        return grad_query, None if partials is None else partials.sum(0).to(problem.rpb_dtype), delta

    return call


def bind_key_gradients(
    problem: Problem, operands: Operands, grad_output: Tensor
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of query, key, value, rpb, lse, delta and grad_output: gradients of key and value. lse and delta contiguous."""
    planned = flash_launch.key_gradient_launches(*_layout(problem, operands, grad_output))
    launches = [launch.bind(problem.device) for launch in planned]
    _, new_key_gradient, new_value_gradient = bound.new_gradients(problem)

    def call(
        query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, lse: Tensor, delta: Tensor, grad_output: Tensor
    ) -> tuple[Tensor, Tensor]:
        rpb = None if rpb is None else rpb.contiguous()
        gradients = new_key_gradient(), new_value_gradient()
        addresses = [*map(address, (query, key, value, lse, delta, grad_output, *gradients, rpb))]
        for launch in launches:
            launch(*addresses)
        return gradients

    return call


def bind_additional_gradients(
    problem: Problem, operands: Operands, grad_output: Tensor
) -> Callable[..., tuple[Tensor, Tensor]]:
    """As `bind_key_gradients`, of query, additional keys, additional values, lse, delta and grad_output."""
    planned = flash_launch.additional_gradient_launches(*_layout(problem, operands, grad_output))
    launches = [launch.bind(problem.device) for launch in planned]
    parts = max(launch.parts for launch in planned)

    def call(
        query: Tensor, keys: Tensor, values: Tensor, lse: Tensor, delta: Tensor, grad_output: Tensor
    ) -> tuple[Tensor, Tensor]:
        key_sums, value_sums = (t.new_zeros((parts, *t.shape), dtype=torch.float32) for t in (keys, values))
        addresses = [*map(address, (query, keys, values, lse, delta, grad_output, key_sums, value_sums, None))]
        for launch in launches:
            launch(*addresses)
        return key_sums.sum(0).to(problem.dtype), value_sums.sum(0).to(problem.dtype)

    return call


def _layout(problem: Problem, operands: Operands, *gradients: Tensor) -> tuple[Problem, tuple[Strides, ...], int, bool]:
    """What launches depend on: problem, strides, alignment, whether TF32 will do."""
    read = (operands.query, operands.key, operands.value, operands.additional_keys, operands.additional_values)
    present = [tensor for tensor in (*read, *gradients) if tensor is not None]
    return problem, tuple(tensor.stride() for tensor in present), alignment(*present), allows_tf32()


def representative_sources() -> Iterable[KernelSource]:
    """Kernels that must compile without a spill on every architecture."""
    square = (Axis(56, 7), Axis(56, 7))
    device = torch.device("cuda")
    cases = [
        (square, 32, torch.float16, torch.float32),
        (square, 64, torch.bfloat16, None),
        (square, 128, torch.bfloat16, None),
        (square, 32, torch.float32, None),
        (square, 64, torch.float32, torch.float32),
        ((Axis(4096, 256, causal=True),), 128, torch.float16, None),
        ((Axis(16, 5), Axis(32, 7, 2), Axis(32, 7, stride=2)), 64, torch.bfloat16, torch.bfloat16),
    ]
    for axes, head_dim, dtype, rpb_dtype in cases:
        problem = Problem(8, axes, 4, 4, head_dim, head_dim, head_dim**-0.5, dtype, device, rpb_dtype=rpb_dtype)
        for allow_tf32 in (False, True) if dtype == torch.float32 else (False,):
            yield from sources(problem, allow_tf32)


def sources(problem: Problem, allow_tf32: bool = False) -> Iterable[KernelSource]:
    """All kernels of a problem's forward and backward passes on aligned tensors."""
    arithmetic = arithmetic_of(problem.dtype, allow_tf32)
    yield plan_forward(problem, arithmetic, 16).source
    yield plan_query_gradient(problem, arithmetic, 16, problem.has_rpb).source
    for grad_key, grad_value in key_gradient_passes(problem, arithmetic):
        yield plan_key_gradient(problem, arithmetic, 16, grad_key, grad_value, False).source
        if problem.additional:
            yield plan_key_gradient(problem, arithmetic, 16, grad_key, grad_value, True).source
