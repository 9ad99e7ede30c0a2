"""What bound calls (see kernels/calls.py) are made of: launches with all but addresses fixed, and new tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.cuda import runtime
from kernels.cuda.arguments import Pointers
from kernels.cuda.jit import KernelSource
from kernels.problem import Problem


def launch(
    source: KernelSource, device: torch.device, grid: int, shared_bytes: int, pointers: Pointers, packed: bytes
) -> Callable[..., None]:
    """A function of the addresses of `pointers`, which are all that `packed` lacks. Compiles and loads the kernel."""
    start = runtime.kernel(source, device).launch
    pack, template = pointers.pack, pointers.template(packed)

    def run(*addresses: int) -> None:
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


def new_gradients(problem: Problem) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """As `new`, for the gradients of query, key and value."""
    tokens = (problem.batch, *problem.space)
    new_query = new((*tokens, problem.heads, problem.head_dim), problem.dtype, problem.device)
    new_key = new((*tokens, problem.key_heads, problem.head_dim), problem.dtype, problem.device)
    new_value = new((*tokens, problem.key_heads, problem.value_dim), problem.dtype, problem.device)
    return lambda: (new_query(), new_key(), new_value())
