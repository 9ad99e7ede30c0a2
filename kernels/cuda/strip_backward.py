"""Kernel family `strip`, backward: gradients of small sliding 2-D windows, any dilation, in half precision.

One kernel computes all gradients in one pass over the operands, without atomics; see src/strip_backward.cuh. A block
walks down a column tile of a map and keeps the rows that it needs in rings in shared memory. The bias gradient comes as
one part per block, summed afterwards in a fixed order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import BoundBackward, Operands
from kernels.cuda import bound, runtime
from kernels.cuda.arguments import (
    FLOAT,
    GEOMETRY,
    INT,
    POINTER,
    TENSOR,
    Struct,
    aligned,
    pack_geometry,
    pack_tensor,
    why_not_near,
)
from kernels.cuda.bound import Launch
from kernels.cuda.dry import HOPPER
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.nat_layers import nat_layer
from kernels.cuda.runtime import DeviceProperties
from kernels.cuda.strip import BLOCK_RESERVE, DTYPES, GRID, HEAD_DIMS, SMALLEST_SCALE, pack_grid
from kernels.problem import Axis, Problem

MAX_WINDOW = (9, 8)
MAX_BIAS_WINDOW_ROWS = 8
"""The bias gradient gathers 2 k - 1 row offsets in one product of 16 rows."""

BIAS_LINES_BEFORE = 8
STEP_ROWS = 8
PRODUCT_COLUMNS = 8
STEP_BYTES = 160
SWEEPS_BYTES = 4 * 48
"""Tables of a step, and of a pair of columns: StripStep, and StripSweep in two phases of up to two."""

STRIP_BACKWARD = Struct(
    "StripBackwardArguments",
    "fastna/strip_backward_ring.cuh",
    tensors=(TENSOR, 8),
    lse=POINTER,
    grad_lse=POINTER,
    rpb=POINTER,
    grad_rpb=POINTER,
    geometry=GEOMETRY,
    grid=GRID,
    step_rows=INT,
    chunk_rows=INT,
    tile_columns=INT,
    ring_rows=INT,
    pitch=INT,
    scale_log2=FLOAT,
    walk_rows=INT,
)
_set_pointers = STRIP_BACKWARD.pointers(
    *(f"tensors[{index}].data" for index in range(8)),
    "lse",
    "grad_lse",
    "rpb",
    "grad_rpb",
)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a map is cut, and by how many warps it is worked on. The choice changes gradients by rounding only."""

    tiles: int
    """Column tiles, side by side."""
    step_rows: int
    """Rows of a step, at most 8."""
    warps: int
    """Warps of a block."""
    blocks: int
    """Blocks that an SM shall hold."""
    chunks: int = 1
    """Walks, one below another, that a column tile is cut into."""
    ahead: bool = False
    """Whether the rings hold the next step's rows too, which then come in during this one."""


@dataclass(frozen=True, slots=True)
class Plan:
    source: KernelSource
    grid: int
    shared_bytes: int
    tile_columns: int
    tiles: int
    step_rows: int
    chunk_rows: int
    chunks: int
    ring_rows: int
    pitch: int
    walk_rows: int


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`'s backward pass, in one sentence; None if it does."""
    if problem.rank != 2:
        return f"strip takes 2-D problems; this one has rank {problem.rank}"
    if problem.dtype not in DTYPES:
        return f"strip computes in float16 and bfloat16; this is {problem.dtype}"
    if problem.head_dim != problem.value_dim or problem.head_dim not in HEAD_DIMS:
        dims = f"{problem.head_dim}, {problem.value_dim}"
        return f"strip takes head dims {HEAD_DIMS}, equal for query and value; these are {dims}"
    if any(problem.is_causal) or any(stride != 1 for stride in problem.stride):
        return "strip knows no causal masking and no stride"
    if any(window > limit for window, limit in zip(problem.window, MAX_WINDOW, strict=True)):
        return f"strip takes windows up to {MAX_WINDOW} backward; this one is {problem.window}"
    if problem.has_rpb and problem.window[0] > MAX_BIAS_WINDOW_ROWS:
        return (
            f"strip takes up to {MAX_BIAS_WINDOW_ROWS} window rows with a bias, backward; here are {problem.window[0]}"
        )
    if problem.key_heads != problem.heads:
        return "strip knows no grouped-query heads backward"
    if problem.additional:
        return "strip knows no additional keys"
    if not SMALLEST_SCALE <= problem.scale < float("inf"):
        return f"strip needs a finite scale of at least {SMALLEST_SCALE}; it is {problem.scale}"
    rows, columns = problem.space
    if rows * columns * problem.batch * problem.heads > runtime.MAX_GRID:
        return "strip might need more blocks than a grid has"
    device = runtime.properties(problem.device)
    if choose_tile(problem, problem.has_rpb, device) is None:
        return f"strip needs more shared memory backward than the {device.shared_memory} bytes of a block"
    return None


def why_not_gradient(operands: Operands, grad_output: Tensor) -> str | None:
    """Why the addresses and strides of the tensors do not suit the kernel, in one sentence; None if they do."""
    return why_not_near(query=operands.query, key=operands.key, value=operands.value, grad_output=grad_output)


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
    read = (operands.query, operands.key, operands.value, aligned(output.contiguous()), grad_output)
    plan, packed = _prepared(problem, needs_rpb_grad, *(tensor.stride() for tensor in read))
    launch = Launch(plan.source, plan.grid, plan.shared_bytes, packed, _set_pointers).bind(problem.device)
    return bound.backward(problem, launch, plan.grid // problem.heads if needs_rpb_grad else 0)


@functools.lru_cache(maxsize=1024)
def _prepared(problem: Problem, needs_rpb_grad: bool, *strides: tuple[int, ...]) -> tuple[Plan, bytes]:
    tile = choose_tile(problem, needs_rpb_grad, runtime.properties(problem.device))
    assert tile is not None, "why_not refuses what fits no block"
    chosen = plan(problem, tile, needs_rpb_grad)
    return chosen, pack(problem, chosen, *strides)


def pack(problem: Problem, plan: Plan, *strides: tuple[int, ...]) -> bytes:
    """The kernel's arguments but for the pointers; strides of query, key, value, output and grad_output."""
    height, width = problem.space
    token = problem.heads * problem.head_dim
    gradient = pack_tensor((height * width * token, width * token, token, problem.head_dim), 2)
    return STRIP_BACKWARD.pack(
        tensors=[*(pack_tensor(stride, 2) for stride in strides), gradient, gradient, gradient],
        geometry=pack_geometry(problem),
        grid=pack_grid(problem, plan.tiles, plan.chunks),
        step_rows=plan.step_rows,
        chunk_rows=plan.chunk_rows,
        tile_columns=plan.tile_columns,
        ring_rows=plan.ring_rows,
        pitch=plan.pitch,
        scale_log2=problem.scale * math.log2(math.e),
        walk_rows=plan.walk_rows,
    )


@functools.lru_cache(maxsize=1024)
def choose_tile(problem: Problem, needs_rpb_grad: bool, device: DeviceProperties) -> Tile | None:
    """The cheapest tile whose rings fit into shared memory as often as registers allow.

    One block per SM where even narrow tiles do not fit twice; None if not once. A small batch cuts maps into several
    walks.
    """
    rows, columns = _longest_map(problem)

    def fits(tile: Tile) -> bool:
        used = plan(problem, tile, needs_rpb_grad).shared_bytes + BLOCK_RESERVE
        return tile.blocks * used <= device.shared_memory + BLOCK_RESERVE

    # A thread may have 128 registers if an SM runs 16 warps, 255 if 8: enough for 32 channels, or 64.
    many, few = ((4, 4), (8, 2)) if problem.head_dim == 32 else ((4, 2), (4, 2))
    candidates = itertools.chain(
        ((many, 1),) if columns <= 2 * PRODUCT_COLUMNS else (),
        ((few, tiles) for tiles in range(1, max(1, columns // problem.axes[1].window) + 1)),
        (((few[0], 1), tiles) for tiles in range(1, -(-columns // 2) + 1)),
    )
    best = None
    for (warps, blocks), tiles in candidates:
        if best is not None and blocks < best.blocks:
            break
        steps = (Tile(tiles, step_rows, warps, blocks) for step_rows in range(min(STEP_ROWS, rows), 0, -1))
        options = [tile for tile in steps if fits(tile)] + ([best] if best is not None else [])
        best = min(options, key=functools.partial(_instructions, problem), default=None)
    if best is None:
        return None
    walks = plan(problem, best, needs_rpb_grad).grid
    wanted = -(-best.blocks * device.multiprocessors // walks)
    tile = replace(best, chunks=max(1, min(wanted, rows // (2 * best.step_rows))))
    return ahead if fits(ahead := replace(tile, ahead=True)) else tile


def candidate_tiles(problem: Problem, needs_rpb_grad: bool, device: DeviceProperties) -> list[Tile]:
    """At most four tiles worth measuring, where any fits: what `choose_tile` takes, then others.

    They differ in whether copies come in while products run, and in warps that idle at the end of a step.
    """
    guess = choose_tile(problem, needs_rpb_grad, device)
    if guess is None:
        return []
    tiles = [
        guess,
        replace(guess, warps=7, blocks=min(guess.blocks, 2)),
        replace(guess, tiles=guess.tiles + 1, ahead=True),
        replace(guess, tiles=guess.tiles + 1, ahead=False),
    ]

    def fits(tile: Tile) -> bool:
        shared_bytes = plan(problem, tile, needs_rpb_grad).shared_bytes + BLOCK_RESERVE
        return tile.blocks * shared_bytes <= device.shared_memory + BLOCK_RESERVE and tile.blocks * tile.warps <= 16

    return [tile for tile in dict.fromkeys(tiles) if tile == guess or fits(tile)]


def plan(problem: Problem, tile: Tile, needs_rpb_grad: bool) -> Plan:
    rows, columns = _longest_map(problem)
    row_axis, column_axis = problem.axes
    tile_columns = 2 * -(-columns // (2 * tile.tiles))  # whole pairs
    tiles = -(-columns // tile_columns)
    chunk_rows = tile.step_rows * -(-rows // (tile.step_rows * tile.chunks))  # whole steps
    chunks = -(-rows // chunk_rows)
    # One row more while others come in: StripBackwardWalk::whole_pairs.
    ring_rows = _most_needed(row_axis, tile.step_rows, 2 if tile.ahead else 1) + int(tile.ahead)
    pitch = max(PRODUCT_COLUMNS, _most_needed(column_axis, tile_columns, 1))
    walk_rows = _round_up(min(rows, chunk_rows + 2 * row_axis.window) + 1, 2)
    source = KernelSource(
        header="src/strip_backward.cuh",
        function="strip_backward",
        config=instantiate(
            "StripBackwardConfig",
            problem.dtype,
            problem.rpb_dtype or torch.float32,
            problem.head_dim,
            *problem.window,
            tile.warps,
            problem.has_rpb,
            needs_rpb_grad,
        ),
        arguments="StripBackwardArguments",
        threads=32 * tile.warps,
        min_blocks=tile.blocks,
    )
    lines, offsets = 2 * row_axis.window - 1, 2 * column_axis.window - 1
    # StripBackwardMemory: rings, lse and delta, the bias, the warps' sums of its gradient, row places, views, the walk,
    # two steps, sweeps.
    shared_bytes = ring_rows * pitch * 8 * problem.head_dim + _round_up(ring_rows * pitch * 8, 16)
    if problem.has_rpb:
        shared_bytes += (lines + 2 * BIAS_LINES_BEFORE) * (2 * column_axis.window + 1) * 16
    if needs_rpb_grad:
        shared_bytes += _round_up(tile.warps * lines * offsets, 4) * 4
    shared_bytes += walk_rows * 8 + 7 * 16 + 64 + 2 * STEP_BYTES + tile_columns // 2 * SWEEPS_BYTES
    return Plan(
        source=source,
        grid=problem.batch * problem.heads * row_axis.dilation * column_axis.dilation * tiles * chunks,
        shared_bytes=shared_bytes,
        tile_columns=tile_columns,
        tiles=tiles,
        step_rows=tile.step_rows,
        chunk_rows=chunk_rows,
        chunks=chunks,
        ring_rows=ring_rows,
        pitch=pitch,
        walk_rows=walk_rows,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _longest_map(problem: Problem) -> tuple[int, int]:
    """Rows and columns of the longest dilation group's map: that of group 0."""
    rows, columns = (axis.group_length(0) for axis in problem.axes)
    return rows, columns


def _keys_and_queries(axis: Axis, length: int, begin: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Hulls of the keys of the queries at positions `[begin, end)`, and of the queries of the keys there."""
    last = min(end, length) - 1
    keys = axis.window_at(begin, length)[0], axis.window_at(last, length)[1]
    queries = axis.queries_at(begin, length)[0], axis.queries_at(last, length)[1]
    return keys, queries


@functools.cache
def _most_needed(axis: Axis, size: int, steps: int) -> int:
    """Most positions that `steps` successive pieces of `size` need at once, over all pieces of all dilation groups."""
    most = 0
    for length in {axis.group_length(0), axis.group_length(axis.dilation - 1)}:
        for begin in range(0, length, size):
            keys, queries = _keys_and_queries(axis, length, begin, begin + steps * size)
            most = max(most, max(keys[1], queries[1]) - min(keys[0], queries[0]))
    return most


def _instructions(problem: Problem, tile: Tile) -> float:
    """Warp instructions of one map, counted in the compiled kernel: what a step multiplies, and what it loads."""
    length, columns = _longest_map(problem)
    row_axis, column_axis = problem.axes
    tile_columns = 2 * -(-columns // (2 * tile.tiles))
    tiles = -(-columns // tile_columns)
    row_pairs = steps = 0
    for begin in range(0, length, tile.step_rows):
        keys, queries = _keys_and_queries(row_axis, length, begin, begin + tile.step_rows)
        row_pairs += -(-(keys[1] - keys[0]) // 2) + -(-(queries[1] - queries[0]) // 2)
        steps += 1
    multiplied = (99 * row_pairs + 420 * steps) * -(-columns // 2)
    stored_chunks = _most_needed(column_axis, tile_columns, 1) * problem.head_dim // 8
    loaded = (90 + 30 * -(-stored_chunks // 32) + 300 * -(-stored_chunks // 128)) * length * tiles
    return multiplied + loaded


def representative_sources() -> Iterable[KernelSource]:
    """The sliding layers of the published models (kernel size 7, with bias) and neighbouring cases, on Hopper."""

    def source(problem: Problem, needs_rpb_grad: bool = True) -> KernelSource:
        needs_rpb_grad = problem.has_rpb and needs_rpb_grad
        tile = choose_tile(problem, needs_rpb_grad, HOPPER)
        assert tile is not None
        return plan(problem, tile, needs_rpb_grad).source

    for length in (56, 14):
        yield source(nat_layer(length, torch.bfloat16))
    yield source(nat_layer(28, torch.float16))
    yield source(nat_layer(14, torch.bfloat16, head_dim=64))
    yield source(nat_layer(56, torch.bfloat16, rpb=False))
    yield source(nat_layer(28, torch.bfloat16), needs_rpb_grad=False)
    yield source(nat_layer(28, torch.bfloat16, window=5))
