"""Kernel family `flash`: fused neighborhood attention, forward and backward, for every problem.

Scores never leave the chip. Rows of a tile are a box of queries (of keys, for the gradients of key and value) inside
one dilation group; tiles of what they see stream past them. See src/flash_*.cuh; flash_plan.py chooses the tiles.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.backend import BoundForward, Gradients, Operands
from kernels.cuda import bound, flash_launch
from kernels.cuda.arguments import address, aligned, alignment, allows_tf32
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


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """Output and lse of a problem that `why_not` accepts."""
    return bind_forward(problem, operands)(*operands.tensors)


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """See kernels.backend.bind_forward."""
    additional = operands.additional_keys, operands.additional_values
    inputs = _present(operands.query, operands.key, operands.value, *additional)
    strides = tuple(t.stride() for t in inputs)
    planned = flash_launch.forward_launch(problem, strides, alignment(*inputs), allows_tf32())
    launch = planned.bind(problem.device, flash_launch.set_forward)
    new_output, new_lse = bound.new_results(problem)

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rpb = None if rpb is None else rpb.contiguous()
        output, lse = new_output(), new_lse()
        launch(*map(address, (query, key, value, additional_keys, additional_values, output, lse, rpb)))
        return output, lse

    return call


def backward(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> Gradients:
    """Gradients of the operands of a problem that `why_not` accepts; the same bits every time."""
    query, key, value = operands.query, operands.key, operands.value
    extra_keys, extra_values = operands.additional_keys, operands.additional_values
    output, lse = aligned(output.contiguous()), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    rpb = None if operands.rpb is None else operands.rpb.contiguous()
    device = query.device
    inputs = _present(query, key, value, extra_keys, extra_values, grad_output)
    layout = problem, tuple(t.stride() for t in inputs), alignment(*inputs), allows_tf32()

    grad_query, grad_rpb, delta = query_gradient(problem, operands, output, lse, grad_output, grad_lse, needs_rpb_grad)
    grad_key, grad_value = (t.new_empty(t.shape) for t in (key, value))
    for launch in flash_launch.key_gradient_launches(*layout):
        addresses = _addresses(query, key, value, lse, delta, grad_output, grad_key, grad_value, rpb)
        launch.run(device, flash_launch.set_key_gradient(launch.packed, *addresses))

    additional = additional_gradients(problem, operands, lse, delta, grad_output)
    return Gradients(grad_query, grad_key, grad_value, grad_rpb, *additional)


def additional_gradients(
    problem: Problem, operands: Operands, lse: Tensor, delta: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Gradients of additional keys and values, if there are any. lse and delta are contiguous."""
    keys, values = operands.additional_keys, operands.additional_values
    if keys is None or values is None:
        return None, None
    query = operands.query
    inputs = (query, operands.key, operands.value, keys, values, grad_output)
    layout = problem, tuple(t.stride() for t in inputs), alignment(*inputs), allows_tf32()
    launches = flash_launch.additional_gradient_launches(*layout)
    chunks = max(launch.chunks for launch in launches)
    sums = [t.new_zeros((chunks, *t.shape), dtype=torch.float32) for t in (keys, values)]
    for launch in launches:
        addresses = _addresses(query, keys, values, lse, delta, grad_output, *sums, None)
        launch.run(query.device, flash_launch.set_key_gradient(launch.packed, *addresses))
    grad_keys, grad_values = (partial.sum(0).to(problem.dtype) for partial in sums)
    return grad_keys, grad_values


def query_gradient(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of query and, where wanted, of the bias; and delta. output, lse and grad_lse are contiguous."""
    query, key, value, rpb = operands.query, operands.key, operands.value, operands.rpb
    additional = operands.additional_keys, operands.additional_values
    rpb = None if rpb is None else rpb.contiguous()
    inputs = _present(query, key, value, *additional, grad_output)
    layout = problem, tuple(t.stride() for t in inputs), alignment(*inputs), allows_tf32()
    delta, grad_query = torch.empty_like(lse), query.new_empty(query.shape)
    launch = flash_launch.query_gradient_launch(*layout, needs_rpb_grad and rpb is not None)
    partials = None
    if needs_rpb_grad and rpb is not None:
        partials = query.new_zeros((launch.chunks, *problem.rpb_shape), dtype=torch.float32)
    addresses = _addresses(query, key, value, *additional, output, lse, grad_output, grad_lse)
    addresses += _addresses(grad_query, delta, rpb, partials)
    launch.run(query.device, flash_launch.set_query_gradient(launch.packed, *addresses))
    return grad_query, None if partials is None else partials.sum(0).to(problem.rpb_dtype), delta


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


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(map(address, tensors))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
