"""Kernel family `block`: dense dilation groups of at most 64 tokens, forward and backward, in half precision.

Where window x dilation = length on every axis there is nothing to slide and nothing to mask: DiNAT's dilated layers at
224 pixels (56 / 8, 28 / 4, 14 / 2) and every model's 7 x 7 stage. See include/fastna/block_layout.cuh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import BoundBackward, BoundForward, Operands
from kernels.cuda import bound, runtime
from kernels.cuda.arguments import (
    GEOMETRY,
    INT,
    MAP_LIMIT,
    POINTER,
    TENSOR,
    TENSOR_LIMIT,
    Struct,
    pack_geometry,
    pack_tensor,
    padded_axes,
    why_not_near,
)
from kernels.cuda.bound import Launch
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.strip import DTYPES, HEAD_DIMS, SMALLEST_SCALE
from kernels.problem import Problem

MAX_TOKENS = 64
BLOCK_FORWARD = Struct(
    "BlockForwardArguments",
    "src/block_forward.cuh",
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    output=TENSOR,
    lse=POINTER,
    rpb=POINTER,
    geometry=GEOMETRY,
    items=INT,
    slices=INT,
)
_set_forward = BLOCK_FORWARD.pointers()

BLOCK_BACKWARD = Struct(
    "BlockBackwardArguments",
    "src/block_backward.cuh",
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    output=TENSOR,
    grad_output=TENSOR,
    grad_query=POINTER,
    grad_key=POINTER,
    grad_value=POINTER,
    lse=POINTER,
    grad_lse=POINTER,
    rpb=POINTER,
    grad_rpb=POINTER,
    geometry=GEOMETRY,
    items=INT,
    slices=INT,
    spread=INT,
)
_set_backward = BLOCK_BACKWARD.pointers()


@dataclass(frozen=True, slots=True)
class Tuning:
    """`stages` items in shared memory, one of them in work; `blocks` (of 128 threads at most) on an SM."""

    stages: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    source: KernelSource
    grid: int
    shared_bytes: int
    items: int
    slices: int


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`, in one sentence; None if it does, in both directions."""
    if not problem.is_dense:
        return "block takes windows that hold their whole dilation group: window * dilation = length on every axis"
    if problem.window_size > MAX_TOKENS:
        return f"block takes at most {MAX_TOKENS} tokens per dilation group; this has {problem.window_size}"
    if problem.dtype not in DTYPES:
        return f"block computes in float16 and bfloat16; this is {problem.dtype}"
    if problem.head_dim != problem.value_dim or problem.head_dim not in HEAD_DIMS:
        return (
            f"block takes head dims {HEAD_DIMS}, equal for query and value; "
            f"these are {problem.head_dim}, {problem.value_dim}"
        )
    if problem.key_heads != problem.heads:
        return f"block needs as many key heads as heads; these are {problem.key_heads}, {problem.heads}"
    if problem.additional:
        return "block knows no additional keys"
    if any(stride != 1 for stride in problem.stride):
        return "block knows no stride"
    if not SMALLEST_SCALE <= problem.scale < float("inf"):
        return f"block needs a finite scale of at least {SMALLEST_SCALE}; it is {problem.scale}"
    elements = problem.tokens * problem.heads * problem.head_dim
    if elements >= MAP_LIMIT or problem.batch * elements >= TENSOR_LIMIT:
        return f"block takes maps of fewer than {MAP_LIMIT} elements, and tensors of fewer than {TENSOR_LIMIT}"
    return None


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why the addresses and strides of the tensors do not suit the kernels, in one sentence; None if they do."""
    return why_not_near(query=operands.query, key=operands.key, value=operands.value)


def why_not_gradient(operands: Operands, grad_output: Tensor) -> str | None:
    """The same for the backward pass."""
    return why_not_near(query=operands.query, key=operands.key, value=operands.value, grad_output=grad_output)


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """Of problems and tensors that `why_not` and `why_not_operands` accept. See kernels.backend.bind_forward."""
    strides = (operands.query.stride(), operands.key.stride(), operands.value.stride())
    plan, packed = _prepared_forward(problem, *strides)
    launch = Launch(plan.source, plan.grid, plan.shared_bytes, packed, _set_forward).bind(problem.device)
    return bound.forward(problem, launch)


def bind_backward(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> BoundBackward:
    """Of problems and tensors that `why_not` and `why_not_gradient` accept; the same bits every time."""
    read = (operands.query, operands.key, operands.value, grad_output)
    strides = tuple(tensor.stride() for tensor in read)

    def launch_of(spread: int) -> Callable[..., None]:
        plan, packed = _prepared_backward(problem, strides, grad_lse is not None, needs_rpb_grad, spread)
        return Launch(plan.source, plan.grid, plan.shared_bytes, packed, _set_backward).bind(problem.device)

    plan, _ = _prepared_backward(problem, strides, grad_lse is not None, needs_rpb_grad, 1)
    return bound.backward(problem, launch_of(1), plan.slices if needs_rpb_grad else 0, lambda: launch_of(3))


@functools.lru_cache(maxsize=1024)
def _prepared_forward(
    problem: Problem, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> tuple[Plan, bytes]:
    plan = plan_forward(
        problem,
        forward_tuning(problem),
        runtime.properties(problem.device).multiprocessors,
        alike=query == key == value,
    )
    packed = BLOCK_FORWARD.pack(
        query=pack_tensor(query, problem.rank),
        key=pack_tensor(key, problem.rank),
        value=pack_tensor(value, problem.rank),
        output=pack_tensor(_contiguous(problem), problem.rank),
        geometry=pack_geometry(problem),
        items=plan.items,
        slices=plan.slices,
    )
    return plan, packed


@functools.lru_cache(maxsize=1024)
def _prepared_backward(
    problem: Problem, strides: tuple[tuple[int, ...], ...], has_grad_lse: bool, needs_rpb_grad: bool, spread: int
) -> tuple[Plan, bytes]:
    properties = runtime.properties(problem.device)
    plan = plan_backward(
        problem,
        backward_tuning(problem, properties.shared_memory),
        properties.multiprocessors,
        has_grad_lse=has_grad_lse,
        needs_rpb_grad=needs_rpb_grad,
        alike=strides[0] == strides[1] == strides[2],
        grad_contiguous=strides[3] == _contiguous(problem),
    )
    query, key, value, grad_output = (pack_tensor(stride, problem.rank) for stride in strides)
    packed = BLOCK_BACKWARD.pack(
        query=query,
        key=key,
        value=value,
        output=pack_tensor(_contiguous(problem), problem.rank),
        grad_output=grad_output,
        geometry=pack_geometry(problem),
        items=plan.items,
        slices=plan.slices,
        spread=spread,
    )
    return plan, packed


def forward_tuning(problem: Problem) -> Tuning:
    return Tuning(stages=3, blocks=4) if problem.head_dim == 32 else Tuning(stages=2, blocks=3)


def backward_tuning(problem: Problem, shared_memory: int) -> Tuning:
    """`shared_memory`: bytes that a block may have."""
    if problem.head_dim == 32:
        return Tuning(stages=2, blocks=3)
    tuning = Tuning(stages=2, blocks=2)
    return tuning if _backward_bytes(problem, tuning) <= shared_memory else Tuning(stages=1, blocks=2)


def plan_forward(problem: Problem, tuning: Tuning, multiprocessors: int, *, alike: bool = True) -> Plan:
    """`alike`: query, key and value have the same strides, which saves arithmetic."""
    config = instantiate("BlockForwardConfig", *_common(problem, tuning), problem.has_rpb, alike)
    stage_bytes = 3 * _padded(problem) * problem.head_dim * 2
    return _plan(problem, tuning, multiprocessors, "block_forward", config, tuning.stages * stage_bytes)


def plan_backward(
    problem: Problem,
    tuning: Tuning,
    multiprocessors: int,
    *,
    has_grad_lse: bool = False,
    needs_rpb_grad: bool = True,
    alike: bool = True,
    grad_contiguous: bool = True,
) -> Plan:
    """`alike`: query, key and value have the same strides; `grad_contiguous`: grad_output is contiguous."""
    config = instantiate(
        "BlockBackwardConfig",
        *_common(problem, tuning),
        problem.has_rpb,
        has_grad_lse,
        needs_rpb_grad,
        alike,
        grad_contiguous,
    )
    return _plan(problem, tuning, multiprocessors, "block_backward", config, _backward_bytes(problem, tuning))


def _backward_bytes(problem: Problem, tuning: Tuning) -> int:
    """BlockBackwardConfig::SHARED_BYTES."""
    rows = _padded(problem)
    stage_bytes = 5 * rows * problem.head_dim * 2 + 2 * rows * 4
    bias_bytes = -(-problem.window_size // 8) * rows * 2 * 16
    return 2 * rows * 128 + tuning.stages * stage_bytes + bias_bytes


def _plan(
    problem: Problem, tuning: Tuning, multiprocessors: int, function: str, config: str, shared_bytes: int
) -> Plan:
    items = problem.batch
    for axis in problem.axes:
        items *= axis.dilation
    # As many blocks as run at once, each with its share of one head's items; no more than give every block the same.
    slices = min(max(multiprocessors * tuning.blocks // problem.heads, 1), items)
    slices = -(-items // -(-items // slices))
    source = KernelSource(
        header=f"src/{function}.cuh",
        function=function,
        config=config,
        arguments="BlockForwardArguments" if function == "block_forward" else "BlockBackwardArguments",
        threads=_padded(problem) * 2,
        min_blocks=tuning.blocks,
        shared_bytes=shared_bytes,
    )
    return Plan(source, slices * problem.heads, shared_bytes, items, slices)


def _common(problem: Problem, tuning: Tuning) -> tuple[object, ...]:
    windows = tuple(axis.window for axis in padded_axes(problem))
    return (problem.dtype, problem.rpb_dtype or torch.float32, problem.head_dim, *windows, tuning.stages)


def _padded(problem: Problem) -> int:
    """Rows of a tile: a multiple of the 16 queries of a warp."""
    return -(-problem.window_size // 16) * 16


def _contiguous(problem: Problem) -> tuple[int, ...]:
    """Strides of a contiguous [batch, *space, heads, head_dim]."""
    sizes = (*problem.space, problem.heads, problem.head_dim)
    strides = [1]
    for size in reversed(sizes):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def representative_sources() -> Iterable[KernelSource]:
    """The 7 x 7 groups of the published models, both directions, and head dim 64."""
    from kernels.problem import Axis

    for head_dim, dtype in ((32, torch.bfloat16), (32, torch.float16), (64, torch.bfloat16)):
        problem = Problem(
            batch=1,
            axes=(Axis(7, 7),) * 2,
            heads=2,
            key_heads=2,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5,
            dtype=dtype,
            device=torch.device("cuda"),
            rpb_dtype=torch.float32,
        )
        yield plan_forward(problem, forward_tuning(problem), 132).source
        for shared_memory in (227 << 10, 99 << 10):
            yield plan_backward(problem, backward_tuning(problem, shared_memory), 132).source
