"""Launches of the flash kernels: arguments packed once per problem and strides; a call only writes addresses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

from kernels.cuda.arguments import (
    GEOMETRY,
    INT,
    INT64,
    POINTER,
    TENSOR,
    Struct,
    pack_contiguous,
    pack_geometry,
    pack_tensor,
)
from kernels.cuda.bound import Launch
from kernels.cuda.flash_plan import (
    arithmetic_of,
    key_gradient_passes,
    plan_forward,
    plan_key_gradient,
    plan_query_gradient,
    rpb_entries,
    without_windows,
)
from kernels.cuda.flash_tiles import row_tiles
from kernels.problem import MAX_RANK, Problem

BLOCKS_WANTED = 512
"""Blocks that share the work where partial sums cost memory: two or more on each multiprocessor of a large device."""

PARTIALS_LIMIT = 64 << 20
"""Bytes of partial sums of the bias gradient."""

FLASH_FORWARD = Struct(
    "FlashForwardArguments",
    "src/flash_forward.cuh",
    geometry=GEOMETRY,
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    additional_keys=TENSOR,
    additional_values=TENSOR,
    output=TENSOR,
    lse=TENSOR,
    rpb=POINTER,
    tiles=INT.array(MAX_RANK),
)
_set_forward = FLASH_FORWARD.pointers("query.data", "key.data", "value.data", "output.data", "lse.data", "rpb")
_set_forward_with_additional = FLASH_FORWARD.pointers()

FLASH_QUERY_GRADIENT = Struct(
    "FlashQueryGradientArguments",
    "src/flash_query_gradient.cuh",
    geometry=GEOMETRY,
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    additional_keys=TENSOR,
    additional_values=TENSOR,
    output=TENSOR,
    lse=TENSOR,
    grad_output=TENSOR,
    grad_lse=TENSOR,
    grad_query=TENSOR,
    delta=TENSOR,
    rpb=POINTER,
    rpb_partials=POINTER,
    tiles=INT.array(MAX_RANK),
    all_tiles=INT,
)
_set_query_gradient = FLASH_QUERY_GRADIENT.pointers()

FLASH_KEY_GRADIENT = Struct(
    "FlashKeyGradientArguments",
    "src/flash_key_gradient.cuh",
    geometry=GEOMETRY,
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    lse=TENSOR,
    delta=TENSOR,
    grad_output=TENSOR,
    grad_key=TENSOR,
    grad_value=TENSOR,
    rpb=POINTER,
    tiles=INT.array(MAX_RANK),
    chunk_tiles=INT,
    key_partial=INT64,
    value_partial=INT64,
)
_set_key_gradient = FLASH_KEY_GRADIENT.pointers()

Strides = tuple[int, ...]
NO_TENSOR = bytes(TENSOR.size)


def _pack_inputs(problem: Problem, strides: tuple[Strides, ...]) -> dict[str, bytes]:
    """The tensors of these strides: query, key, value, the additional ones if any, grad_output in a backward pass."""
    packed = {
        name: pack_tensor(stride, problem.rank)
        for name, stride in zip(("query", "key", "value"), strides[:3], strict=True)
    }
    rest = strides[3:]
    packed |= {"additional_keys": NO_TENSOR, "additional_values": NO_TENSOR}
    if problem.additional:
        packed |= {"additional_keys": pack_tensor(rest[0], 1), "additional_values": pack_tensor(rest[1], 1)}
        rest = rest[2:]
    if rest:
        packed["grad_output"] = pack_tensor(rest[0], problem.rank)
    return packed


def _all_tiles(problem: Problem, tiles: Iterable[int], heads: int) -> int:
    return math.prod(tiles) * math.prod(problem.dilation) * problem.batch * heads


@functools.lru_cache(maxsize=1024)
def forward_launch(problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool) -> Launch:
    plan = plan_forward(problem, arithmetic_of(problem.dtype, allow_tf32), vector)
    tiles = row_tiles(problem.axes, plan.choice.tiling.rows)
    packed = FLASH_FORWARD.pack(
        geometry=pack_geometry(problem),
        **_pack_inputs(problem, strides),
        output=pack_contiguous(problem, problem.heads, problem.value_dim),
        lse=pack_contiguous(problem, problem.heads, 1),
        tiles=tiles,
    )
    pointers = _set_forward_with_additional if problem.additional else _set_forward
    return Launch(plan.source, _all_tiles(problem, tiles, problem.heads), plan.shared_bytes, packed, pointers)


@functools.lru_cache(maxsize=1024)
def query_gradient_launch(
    problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool, needs_rpb_grad: bool
) -> Launch:
    plan = plan_query_gradient(problem, arithmetic_of(problem.dtype, allow_tf32), vector, needs_rpb_grad)
    tiles = row_tiles(problem.axes, plan.choice.tiling.rows)
    all_tiles = _all_tiles(problem, tiles, problem.heads)
    lse = pack_contiguous(problem, problem.heads, 1)
    packed = FLASH_QUERY_GRADIENT.pack(
        geometry=pack_geometry(problem),
        **_pack_inputs(problem, strides),
        output=pack_contiguous(problem, problem.heads, problem.value_dim),
        lse=lse,
        grad_lse=lse,
        grad_query=pack_contiguous(problem, problem.heads, problem.head_dim),
        delta=lse,
        tiles=tiles,
        all_tiles=all_tiles,
    )
    chunks = all_tiles // problem.heads
    if needs_rpb_grad:
        affordable = PARTIALS_LIMIT // (4 * rpb_entries(problem) * problem.heads)
        chunks = max(min(chunks, -(-BLOCKS_WANTED // problem.heads), affordable), 1)
    return Launch(plan.source, chunks * problem.heads, plan.shared_bytes, packed, _set_query_gradient, chunks)


@functools.lru_cache(maxsize=1024)
def key_gradient_launches(
    problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool
) -> tuple[Launch, ...]:
    arithmetic = arithmetic_of(problem.dtype, allow_tf32)
    inputs = _pack_inputs(problem, strides)
    launches = []
    for grad_key, grad_value in key_gradient_passes(problem, arithmetic):
        plan = plan_key_gradient(problem, arithmetic, vector, grad_key, grad_value, additional_rows=False)
        tiles = row_tiles(problem.axes, plan.choice.tiling.rows)
        packed = _pack_key_gradient(
            problem,
            inputs,
            key=inputs["key"],
            value=inputs["value"],
            grad_key=pack_contiguous(problem, problem.key_heads, problem.head_dim),
            grad_value=pack_contiguous(problem, problem.key_heads, problem.value_dim),
            tiles=tiles,
            chunk_tiles=0,
        )
        grid = _all_tiles(problem, tiles, problem.key_heads)
        launches.append(Launch(plan.source, grid, plan.shared_bytes, packed, _set_key_gradient))
    return tuple(launches)


@functools.lru_cache(maxsize=1024)
def additional_gradient_launches(
    problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool
) -> tuple[Launch, ...]:
    """Rows are the additional keys; a block takes `chunk_tiles` tiles of the map's queries and leaves a partial sum."""
    arithmetic = arithmetic_of(problem.dtype, allow_tf32)
    inputs = _pack_inputs(problem, strides)
    map_only = without_windows(problem)
    launches = []
    for grad_key, grad_value in key_gradient_passes(problem, arithmetic):
        plan = plan_key_gradient(problem, arithmetic, vector, grad_key, grad_value, additional_rows=True)
        tiles = -(-problem.additional // plan.choice.rows)
        blocks = tiles * problem.batch * problem.key_heads
        query_tiles = math.prod(row_tiles(map_only.axes, plan.choice.tiling.columns))
        chunk_tiles = -(-query_tiles // max(-(-BLOCKS_WANTED // blocks), 1))
        chunks = -(-query_tiles // chunk_tiles)
        packed = _pack_key_gradient(
            map_only,
            inputs,
            key=inputs["additional_keys"],
            value=inputs["additional_values"],
            grad_key=_additional_output(problem, problem.head_dim),
            grad_value=_additional_output(problem, problem.value_dim),
            tiles=(1, 1, tiles),
            chunk_tiles=chunk_tiles,
        )
        launches.append(Launch(plan.source, chunks * blocks, plan.shared_bytes, packed, _set_key_gradient, chunks))
    return tuple(launches)


def _pack_key_gradient(problem: Problem, inputs: dict[str, bytes], **rest: object) -> bytes:
    lse = pack_contiguous(problem, problem.heads, 1)
    tokens = problem.batch * problem.additional * problem.key_heads
    return FLASH_KEY_GRADIENT.pack(
        geometry=pack_geometry(problem),
        query=inputs["query"],
        grad_output=inputs["grad_output"],
        lse=lse,
        delta=lse,
        key_partial=tokens * problem.head_dim,
        value_partial=tokens * problem.value_dim,
        **rest,
    )


def _additional_output(problem: Problem, channels: int) -> bytes:
    row = problem.key_heads * channels
    return pack_tensor((problem.additional * row, row, channels), 1)
