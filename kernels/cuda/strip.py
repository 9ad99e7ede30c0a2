"""Kernel family `strip`: the forward pass of small sliding 2-D windows, any dilation, in half precision.

A block keeps the keys and values of a tile's windows in shared memory and a whole window's scores in registers; see
src/strip_forward.cuh. This serves the sliding layers of every published NAT and DiNAT model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Operands
from kernels.cuda import runtime
from kernels.cuda.arguments import GEOMETRY, INT, POINTER, TENSOR, Struct, pack_geometry, pack_tensor
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Problem

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64)
MAX_WINDOW = (9, 7)
INT_MAX = 2**31 - 1
SMALLEST_SCALE = 1e-6
"""Scores start from bias / scale, and from -1e30 where masked."""

QUERY_ROWS = 8
KEY_COLUMNS = 8

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
    tiles=INT,
    strips=INT,
)
_set_pointers = STRIP_FORWARD.pointers("query.data", "key.data", "value.data", "output.data", "lse", "rpb")


@dataclass(frozen=True, slots=True)
class Tile:
    """How blocks share a call: strips of 8 query rows by `columns` (even) query columns, worked on by `warps` warps.

    `ahead` slabs of keys and values are on their way while one is worked on. An SM is to hold `resident` blocks: their
    shared memory must let it, and the compiler is held to registers that do.
    """

    columns: int
    warps: int
    ahead: int = 1
    resident: int = 2


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
    rows = problem.axes[0]
    shortest = rows.group_length(rows.dilation - 1)
    for length in {shortest, rows.group_length(0)}:
        if length > QUERY_ROWS and rows.window == MAX_WINDOW[0] and length % QUERY_ROWS == 1:
            return f"strip cannot cut {length} rows so that windows of {rows.window} rows stay near their strip"
    longest_rows, longest_columns = _longest_map(problem)
    if longest_rows * problem.batch * rows.dilation > INT_MAX:
        return "strip would need longer walks than it can count"
    if longest_columns * problem.heads * problem.axes[1].dilation > runtime.MAX_GRID:
        return "strip would need more blocks than a grid has"
    return None


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """Output and lse of a problem that `why_not` accepts."""
    query, key, value = aligned(operands.query), aligned(operands.key), aligned(operands.value)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    plan, packed = _prepared(problem, query.stride(), key.stride(), value.stride())
    rpb = None if operands.rpb is None else operands.rpb.contiguous()
    arguments = _set_pointers(
        packed,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        output.data_ptr(),
        lse.data_ptr(),
        0 if rpb is None else rpb.data_ptr(),
    )
    runtime.kernel(plan.source, query.device).launch(plan.grid, plan.shared_bytes, arguments)
    return output, lse


def why_misaligned(problem: Problem, operands: Operands) -> str | None:
    """Why the tensors' addresses do not suit 16-byte copies, in one sentence; None if they do."""
    for name in ("query", "key", "value"):
        tensor = getattr(operands, name)
        if not _is_aligned(tensor):
            return f"{name} at address {tensor.data_ptr():#x} with strides {tensor.stride()} is not aligned to 16 bytes"
    return None


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why the tensors' addresses do not suit 16-byte copies and 32-bit offsets, in one sentence; None if they do."""
    for name in ("query", "key", "value"):
        strides = getattr(operands, name).stride()
        span = sum(
            (axis.length + 32 * axis.dilation) * stride  # copies work out addresses a little outside the map
            for axis, stride in zip(problem.axes, strides[1:-2], strict=True)
        )
        if span > INT_MAX:
            return f"one batch entry of {name}, with strides {strides}, spans more than 2^31 elements"
    return why_misaligned(problem, operands)


def _is_aligned(tensor: Tensor) -> bool:
    elements = 16 // tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(stride % elements == 0 for stride in tensor.stride()[:-1])


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself if every token starts at a multiple of 16 bytes, as 16-byte copies need; otherwise a copy."""
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _prepared(
    problem: Problem, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> tuple[Plan, bytes]:
    device = runtime.properties(problem.device)
    chosen = plan(problem, choose_tile(problem, device.shared_memory), device.multiprocessors)
    height, width = problem.space
    token = problem.heads * problem.head_dim
    packed = STRIP_FORWARD.pack(
        query=pack_tensor(query, 2),
        key=pack_tensor(key, 2),
        value=pack_tensor(value, 2),
        output=pack_tensor((height * width * token, width * token, token, problem.head_dim), 2),
        geometry=pack_geometry(problem),
        tiles=chosen.tiles,
        strips=chosen.strips,
    )
    return chosen, packed


def choose_tile(problem: Problem, shared_memory: int) -> Tile:
    """Equal parts of a row, at most 14 columns: a warp has one product of each strip, and an SM holds two blocks.

    Where even narrow tiles are too large for two, one. `shared_memory` is what a block may have, in bytes; an SM has
    1 KiB more, and takes 1 KiB for each block.
    """
    _, columns = _longest_map(problem)
    tile = None
    for resident in (2, 1):
        for parts in range(-(-columns // 14), -(-columns // KEY_COLUMNS) + 1):
            width = _round_up(-(-columns // parts), 2)
            tile = Tile(columns=width, warps=width // 2, resident=resident)
            if resident * (_shared_bytes(problem, tile) + 1024) <= shared_memory + 1024:
                return tile
    assert tile is not None
    return tile


def plan(problem: Problem, tile: Tile, multiprocessors: int = 1) -> Plan:
    rows, columns = _longest_map(problem)
    row_axis, column_axis = problem.axes
    strips = -(-rows // QUERY_ROWS)
    tiles = -(-columns // tile.columns)
    shared_bytes = _shared_bytes(problem, tile)
    config = instantiate(
        "StripForwardConfig",
        problem.dtype,
        problem.rpb_dtype or torch.float32,
        problem.head_dim,
        *problem.window,
        tile.columns,
        _stored_columns(problem, tile),
        _slots(problem, tile),
        tile.ahead,
        tile.warps,
        problem.has_rpb,
    )
    source = KernelSource(
        header="src/strip_forward.cuh",
        function="strip_forward",
        config=config,
        arguments="StripForwardArguments",
        threads=32 * tile.warps,
        min_blocks=tile.resident,
        shared_bytes=shared_bytes,
    )
    walks = problem.heads * tiles * column_axis.dilation
    blocks = _blocks_of_walk(strips * row_axis.dilation * problem.batch, walks, tile.resident * multiprocessors)
    return Plan(source, walks * blocks, shared_bytes, tiles, strips)


def _blocks_of_walk(strips: int, walks: int, resident: int) -> int:
    """Blocks that share each of `walks` sequences of `strips` strips, to end earliest where `resident` run at once.

    A block's start costs about as much as two strips.
    """
    most = min(strips, max(1, 4 * resident // walks))
    return min(range(1, most + 1), key=lambda blocks: -(-walks * blocks // resident) * (-(-strips // blocks) + 2))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _longest_map(problem: Problem) -> tuple[int, int]:
    """Rows and columns of the longest dilation group's map: that of group 0."""
    rows, columns = (axis.group_length(0) for axis in problem.axes)
    return rows, columns


def _key_rows(problem: Problem) -> int:
    return (problem.window[0] + QUERY_ROWS) // 2 * 2


def _stored_columns(problem: Problem, tile: Tile) -> int:
    """Columns of keys in shared memory: all windows of the tile, at most the map, at least one product."""
    _, columns = _longest_map(problem)
    return _round_up(max(KEY_COLUMNS, min(tile.columns + KEY_COLUMNS - 2, columns)), 2)


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
    token = problem.head_dim * 2
    slabs = (tile.ahead + 2) * 2 * QUERY_ROWS * _stored_columns(problem, tile) * token
    products = -(-tile.columns // (2 * tile.warps))
    queries = (tile.ahead + 1) * tile.warps * products * 16 * token
    lines = _slots(problem, tile) * (2 * problem.window[0] - 1) + _key_rows(problem) + 1
    return slabs + queries + lines * 64 + 4 * 48


def representative_sources() -> Iterable[KernelSource]:
    """The sliding layers of the published models (kernel size 7, with bias) and the neighbouring cases."""
    from kernels.problem import Axis

    def source(
        length: int, dtype: torch.dtype, *, head_dim: int = 32, window: int = 7, rpb: bool = True
    ) -> KernelSource:
        problem = Problem(
            batch=1,
            axes=(Axis(length, window),) * 2,
            heads=2,
            key_heads=2,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5,
            dtype=dtype,
            device=torch.device("cuda"),
            rpb_dtype=torch.float32 if rpb else None,
        )
        return plan(problem, choose_tile(problem, 227 << 10)).source

    for length in (56, 28, 14):
        yield source(length, torch.bfloat16)
    yield source(28, torch.float16)
    yield source(14, torch.bfloat16, head_dim=64)
    yield source(56, torch.bfloat16, rpb=False)
    yield source(28, torch.bfloat16, window=5)
