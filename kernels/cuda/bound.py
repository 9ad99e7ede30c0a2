"""What bound calls (see kernels/calls.py) are made of: launches with all but addresses fixed, and new tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend import BoundBackward, BoundForward, Gradients
from kernels.cuda import runtime
from kernels.cuda.arguments import MAP_LIMIT, Pointers, address, aligned
from kernels.cuda.jit import KernelSource
from kernels.problem import Problem


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything about a launch but the addresses of `pointers`, which are all that `packed` lacks."""

    source: KernelSource
    grid: int
    shared_bytes: int
    packed: bytes
    pointers: Pointers
    parts: int = 1
    """Partial sums that the kernel leaves, one behind another, for PyTorch to add up."""

    def bind(self, device: torch.device) -> Callable[..., None]:
        """A function of the addresses. Compiles and loads the kernel."""
        start = runtime.kernel(self.source, device).launch
        grid, shared_bytes = self.grid, self.shared_bytes
        pack, template = self.pointers.pack, self.pointers.template(self.packed)

        def run(*addresses: int | bytes) -> None:
            values = template.copy()
            values[1::2] = addresses
            start(grid, shared_bytes, pack(*values))

        return run


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A function that allocates a contiguous tensor: by `empty_strided`, which takes a third of the time of `empty`."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return functools.partial(torch.empty_strided, tuple(shape), tuple(reversed(strides)), dtype=dtype, device=device)


def new_results(problem: Problem) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """`new` for the output and for lse."""
    queries = (problem.batch, *problem.space, problem.heads)
    return (
        new((*queries, problem.value_dim), problem.dtype, problem.device),
        new(queries, torch.float32, problem.device),
    )


def new_gradients(problem: Problem) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """`new` for the gradients of query, key and value."""
    tokens = (problem.batch, *problem.space)
    shapes = (
        (problem.heads, problem.head_dim),
        (problem.key_heads, problem.head_dim),
        (problem.key_heads, problem.value_dim),
    )
    query, key, value = (new((*tokens, *shape), problem.dtype, problem.device) for shape in shapes)
    return query, key, value


def forward(problem: Problem, launch: Callable[..., None]) -> BoundForward:
    """A forward pass of one launch.

    `launch` takes the addresses of query, key, value, those of additional keys and values where the problem has any,
    output, lse and rpb.
    """
    new_output, new_lse = new_results(problem)

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
        results = output.data_ptr(), lse.data_ptr(), 0 if rpb is None else rpb.data_ptr()
        if additional_keys is None or additional_values is None:
            launch(query.data_ptr(), key.data_ptr(), value.data_ptr(), *results)
        else:
            more = additional_keys.data_ptr(), additional_values.data_ptr()
            launch(query.data_ptr(), key.data_ptr(), value.data_ptr(), *more, *results)
        return output, lse

    return call


class Backward:
    """A bound backward pass, which may also leave its gradients as `packed` ones."""

    __slots__ = ("_call", "packed")

    def __init__(self, call: BoundBackward, packed: Callable[[], BoundBackward] | None) -> None:
        self._call = call
        self.packed = packed
        """The same pass with the gradients of query, key and value as the slices `[batch, *space, 3, heads, head_dim]`
        of one tensor, in that order, if there is one."""

    def __call__(self, *tensors: Any) -> Gradients:
        return self._call(*tensors)


def backward(
    problem: Problem,
    launch: Callable[..., None],
    rpb_parts: int,
    packing_launch: Callable[[], Callable[..., None]] | None = None,
) -> Backward:
    """A backward pass of one launch, for problems without additional keys.

    Args:
        launch: takes the addresses of query, key, value, output (contiguous, aligned), grad_output, the gradients of
            the first three, lse, grad_lse, rpb, and what it writes the gradient of rpb to: `[rpb_parts, *rpb_shape]` in
            float32, to be added up; none where `rpb_parts` is 0.
        packing_launch: makes one that writes gradients whose tokens are three times as far apart, if there is one.
    """
    elements = 3 * problem.batch * problem.tokens * problem.heads * problem.head_dim
    if packing_launch is None or elements >= MAP_LIMIT:
        return Backward(_backward(problem, launch, rpb_parts, False), None)
    return Backward(
        _backward(problem, launch, rpb_parts, False), lambda: _backward(problem, packing_launch(), rpb_parts, True)
    )


def _backward(problem: Problem, launch: Callable[..., None], rpb_parts: int, packs: bool) -> BoundBackward:
    new_query_gradient, new_key_gradient, new_value_gradient = new_gradients(problem)
    tokens = (problem.batch, *problem.space)
    new_packed = new((*tokens, 3, problem.heads, problem.head_dim), problem.dtype, problem.device)
    new_parts = new((rpb_parts, *problem.rpb_shape), torch.float32, problem.device)

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: None,
        additional_values: None,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        output, lse = aligned(output.contiguous()), lse.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        rpb = None if rpb is None else rpb.contiguous()
        if packs:
            grad_query, grad_key, grad_value = new_packed().unbind(-3)
        else:
            grad_query, grad_key, grad_value = new_query_gradient(), new_key_gradient(), new_value_gradient()
        parts = new_parts() if rpb_parts else None
        gradients = grad_query, grad_key, grad_value
        launch(*map(address, (query, key, value, output, grad_output, *gradients, lse, grad_lse, rpb, parts)))
        grad_rpb = None if parts is None else parts.sum(0).to(problem.rpb_dtype)
        return Gradients(grad_query, grad_key, grad_value, grad_rpb)

    return call
