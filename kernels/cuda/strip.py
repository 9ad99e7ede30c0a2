"""Kernel family `strip`: the forward pass of small sliding 2-D windows, any dilation, in half precision.

A block keeps the keys and values of a tile's windows in shared memory and a whole window's scores in registers; see
src/strip_forward.cuh. This serves the sliding layers of every published NAT and DiNAT model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import BoundForward, Operands
from kernels.cuda import bound, runtime, tuning
from kernels.cuda.arguments import (
    FLOAT,
    GEOMETRY,
    INT,
    POINTER,
    TENSOR,
    UINT,
    Struct,
    address,
    pack_geometry,
    pack_tensor,
    why_not_near,
)
from kernels.cuda.bound import Launch
from kernels.cuda.dry import HOPPER
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.nat_layers import nat_layer
from kernels.cuda.runtime import DeviceProperties
from kernels.problem import Problem

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64)
MAX_WINDOW = (9, 7)
SMALLEST_SCALE = 1e-6
"""Scores start from bias / scale, and from -1e30 where masked."""

BLOCK_RESERVE = 1024
"""Shared memory that a block takes besides its own; an SM has as much more than one block may have."""

QUERY_ROWS = 8
KEY_COLUMNS = 8

DIVISOR = Struct("Divisor", "fastna/strip_layout.cuh", divisor=UINT, multiplier=UINT, shift=INT)
GRID = Struct(
    "StripGrid",
    "fastna/strip_layout.cuh",
    heads=DIVISOR,
    tiles=DIVISOR,
    strips=DIVISOR,
    column_groups=DIVISOR,
    row_groups=DIVISOR,
)
STRIP_FORWARD = Struct(
    "StripForwardArguments",
    "src/strip_forward.cuh",
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    output=TENSOR,
    lse=POINTER,
    rpb=POINTER,
    geometry=GEOMETRY,
    grid=GRID,
    sharing=DIVISOR,
    inverse_scale=FLOAT,
)
_set_pointers = STRIP_FORWARD.pointers()


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block computes: `8 * row_blocks` query rows by `columns` (even) query columns, by `warps` warps.

    The compiler is held to registers that let `resident_warps` run on an SM, if their shared memory does: 12 leave a
    thread 168 registers, 8 leave 255. Head dim 32 spills a few with 16, head dim 64 with 12 on some architectures.
    """

    columns: int
    row_blocks: int = 1
    warps: int = 4
    resident_warps: int = 12


@dataclass(frozen=True, slots=True)
class Plan:
    source: KernelSource
    grid: int
    shared_bytes: int
    tiles: int
    strips: int


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`'s forward pass, in one sentence; None if it does."""
    if problem.rank != 2:
        return f"strip takes 2-D problems; this one has rank {problem.rank}"
    if problem.dtype not in DTYPES:
        return f"strip computes in float16 and bfloat16; this is {problem.dtype}"
    if problem.head_dim != problem.value_dim or problem.head_dim not in HEAD_DIMS:
        return (
            f"strip takes head dims {HEAD_DIMS}, equal for query and value; "
            f"these are {problem.head_dim}, {problem.value_dim}"
        )
    if any(problem.is_causal) or any(stride != 1 for stride in problem.stride):
        return "strip knows no causal masking and no stride"
    if any(window > limit for window, limit in zip(problem.window, MAX_WINDOW, strict=True)):
        return f"strip takes windows up to {MAX_WINDOW}; this one is {problem.window}"
    if problem.additional:
        return "strip knows no additional keys"
    if not SMALLEST_SCALE <= problem.scale < float("inf"):
        return f"strip needs a finite scale of at least {SMALLEST_SCALE}; it is {problem.scale}"
    if _longest_map(problem)[0] * problem.batch * problem.heads * problem.axes[0].dilation > runtime.MAX_GRID:
        return "strip would need more blocks than a grid has"
    return None


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """Of problems and tensors that `why_not` and `why_not_operands` accept. See kernels.backend.bind_forward."""
    strides = (operands.query.stride(), operands.key.stride(), operands.value.stride())

    def launch_of(tile: Tile) -> Callable[..., None]:
        plan, packed = _prepared(problem, tile, *strides)
        return Launch(plan.source, plan.grid, plan.shared_bytes, packed, _set_pointers).bind(problem.device)

    @functools.cache
    def tried() -> tuple[Tensor | None, ...]:
        """What candidates read and write: one set of results for all, for memory may be short."""
        rpb = None if operands.rpb is None else operands.rpb.contiguous()
        results = (new_result() for new_result in bound.new_results(problem))
        return operands.query, operands.key, operands.value, *results, rpb

    def start(tile: Tile) -> Callable[[], object]:
        launch = launch_of(tile)
        return lambda: launch(*map(address, tried()))

    candidates = candidate_tiles(problem, runtime.properties(problem.device))
    tile = tuning.choose(_tuned_as(problem), candidates, problem.device, lambda tile: plan(problem, tile).source, start)
    return bound.forward(problem, launch_of(tile))


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why the addresses and strides of the tensors do not suit the kernel, in one sentence; None if they do."""
    return why_not_near(query=operands.query, key=operands.key, value=operands.value)


@functools.lru_cache(maxsize=1024)
def _prepared(
    problem: Problem, tile: Tile, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> tuple[Plan, bytes]:
    chosen = plan(problem, tile)
    height, width = problem.space
    token = problem.heads * problem.head_dim
    packed = STRIP_FORWARD.pack(
        query=pack_tensor(query, 2),
        key=pack_tensor(key, 2),
        value=pack_tensor(value, 2),
        output=pack_tensor((height * width * token, width * token, token, problem.head_dim), 2),
        geometry=pack_geometry(problem),
        grid=pack_grid(problem, chosen.tiles, chosen.strips),
        sharing=_pack_divisor(problem.heads // problem.key_heads),
        inverse_scale=1.0 / problem.scale,
    )
    return chosen, packed


def pack_grid(problem: Problem, tiles: int, strips: int) -> bytes:
    """StripGrid: what block numbers are divided by, see strip_place."""
    row_axis, column_axis = problem.axes
    return GRID.pack(
        heads=_pack_divisor(problem.heads),
        tiles=_pack_divisor(tiles),
        strips=_pack_divisor(strips),
        column_groups=_pack_divisor(column_axis.dilation),
        row_groups=_pack_divisor(row_axis.dilation),
    )


def _pack_divisor(divisor: int) -> bytes:
    """A multiplier of 32 bits: n < 2^31 times its error, below 2^-31 / divisor, never reaches the next quotient."""
    shift = 31 + (divisor - 1).bit_length()
    return DIVISOR.pack(divisor=divisor, multiplier=(1 << shift) // divisor + 1, shift=shift)


def choose_tile(problem: Problem, device: DeviceProperties) -> Tile:
    """The widest tile, of equal parts of a row, of which an SM holds three: some copy while others multiply.

    Where even narrow tiles are too large for three, two or one. A map of two blocks of rows is one tile high, so that
    each of its keys is read once, if there are enough maps to fill the device. Measured on an H200
    (results/nvidia-h200/strip-forward-tiles.json).
    """
    rows, columns = _longest_map(problem)
    maps = problem.batch * problem.heads * math.prod(axis.dilation for axis in problem.axes)
    whole = QUERY_ROWS < rows <= 2 * QUERY_ROWS and maps >= 3 * device.multiprocessors
    for resident in (3, 2, 1):
        for parts in range(1, -(-columns // KEY_COLUMNS) + 1):
            tile = _tile(problem, parts, 2 if whole else 1)
            if _resident(problem, tile, device) >= resident:
                return tile
    return _tile(problem, -(-columns // KEY_COLUMNS), 1)


def candidate_tiles(problem: Problem, device: DeviceProperties) -> list[Tile]:
    """At most four tiles worth measuring: what `choose_tile` takes, then others that fit a block.

    They differ in how often a key is read, in how many products a block's copies and tables serve, and in how many
    blocks an SM holds.
    """
    guess = choose_tile(problem, device)
    narrow = min(guess.columns, 16)
    tiles = [guess, replace(guess, row_blocks=3 - guess.row_blocks)]
    tiles += [replace(guess, columns=narrow, row_blocks=row_blocks) for row_blocks in (2, 1)]
    return [tile for tile in dict.fromkeys(tiles) if tile == guess or _resident(problem, tile, device) >= 1]


def _resident(problem: Problem, tile: Tile, device: DeviceProperties) -> int:
    """Blocks whose shared memory an SM has room for."""
    return (device.shared_memory + BLOCK_RESERVE) // (_shared_bytes(problem, tile) + BLOCK_RESERVE)


def _tile(problem: Problem, parts: int, row_blocks: int) -> Tile:
    """One of `parts` equal parts of a row."""
    _, columns = _longest_map(problem)
    resident_warps = 12 if problem.head_dim == 32 else 8
    return Tile(_round_up(-(-columns // parts), 2), row_blocks, resident_warps=resident_warps)


def _tuned_as(problem: Problem) -> str:
    """What the best tile depends on, sizes of the batch to a factor of two."""
    (height, width), (rows, columns) = problem.space, problem.window
    maps = math.prod(problem.dilation) * problem.batch * problem.heads
    bias = f"{problem.rpb_dtype} bias" if problem.has_rpb else "no bias"
    return (
        f"strip_forward: {height} x {width}, window {rows} x {columns}, dilation {problem.dilation}, "
        f"head_dim {problem.head_dim}, {problem.dtype}, {bias}, 2^{round(math.log2(maps))} maps"
    ).replace("torch.", "")


def plan(problem: Problem, tile: Tile) -> Plan:
    rows, columns = _longest_map(problem)
    row_axis, column_axis = problem.axes
    strips = -(-rows // (QUERY_ROWS * tile.row_blocks))
    tiles = -(-columns // tile.columns)
    shared_bytes = _shared_bytes(problem, tile)
    config = instantiate(
        "StripForwardConfig",
        problem.dtype,
        problem.rpb_dtype or torch.float32,
        problem.head_dim,
        *problem.window,
        tile.row_blocks,
        tile.columns,
        *_stored(problem, tile),
        _slots(problem, tile),
        tile.warps,
        problem.has_rpb,
    )
    source = KernelSource(
        header="src/strip_forward.cuh",
        function="strip_forward",
        config=config,
        arguments="StripForwardArguments",
        threads=32 * tile.warps,
        min_blocks=max(1, min(tile.resident_warps // tile.warps, (228 << 10) // (shared_bytes + 1024))),
        shared_bytes=shared_bytes,
    )
    grid = problem.batch * problem.heads * tiles * strips * row_axis.dilation * column_axis.dilation
    return Plan(source, grid, shared_bytes, tiles, strips)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _longest_map(problem: Problem) -> tuple[int, int]:
    """Rows and columns of the longest dilation group's map: that of group 0."""
    rows, columns = (axis.group_length(0) for axis in problem.axes)
    return rows, columns


def _key_rows(problem: Problem) -> int:
    return (problem.window[0] + QUERY_ROWS) // 2 * 2


def _stored(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Rows and columns of keys in shared memory: all windows of the tile, at most the map, at least one product."""
    rows, columns = _longest_map(problem)
    key_rows = _key_rows(problem)
    stored_rows = max(key_rows, min(key_rows + QUERY_ROWS * (tile.row_blocks - 1), rows))
    stored_columns = max(KEY_COLUMNS, min(tile.columns + KEY_COLUMNS - 2, columns))
    return stored_rows, _round_up(stored_columns, 2)


def _slots(problem: Problem, tile: Tile) -> int:
    """Most slots that a tile's bias table needs; the arithmetic of StripBias in include/fastna/strip_bias.cuh."""
    axis = problem.axes[1]
    most = 1
    for columns in {axis.group_length(0), axis.group_length(axis.dilation - 1)}:
        for first in range(0, columns, tile.columns):
            left_pairs = max(axis.window // 2 - first + 1, 0) // 2
            clamped = columns - KEY_COLUMNS + 1 + axis.window // 2
            right_begin = max(clamped + clamped % 2, first + 2 * left_pairs)
            right_pairs = max(min(columns, first + tile.columns) - right_begin + 1, 0) // 2
            most = max(most, 1 + left_pairs + right_pairs)
    return most


def _shared_bytes(problem: Problem, tile: Tile) -> int:
    """StripForwardConfig::SHARED_BYTES."""
    rows, columns = _stored(problem, tile)
    token = problem.head_dim * 2
    staging = tile.warps * 2 * 16 * token
    lines = _slots(problem, tile) * (2 * problem.window[0] - 1) + _key_rows(problem) + 1
    return 2 * rows * columns * token + staging + lines * 64


def representative_sources() -> Iterable[KernelSource]:
    """The sliding layers of the published models (kernel size 7, with bias) and the neighbouring cases."""

    def source(problem: Problem, candidate: int = 0) -> KernelSource:
        return plan(problem, candidate_tiles(problem, HOPPER)[candidate]).source

    for length in (56, 28, 14):
        yield source(nat_layer(length, torch.bfloat16))
        yield source(nat_layer(length, torch.bfloat16), candidate=1)
    yield source(nat_layer(28, torch.float16))
    yield source(nat_layer(14, torch.bfloat16, head_dim=64))
    yield source(nat_layer(14, torch.bfloat16, head_dim=64), candidate=1)
    yield source(nat_layer(56, torch.bfloat16, rpb=False))
    yield source(nat_layer(28, torch.bfloat16, window=5))
