"""Kernel family `scalar`: the forward pass of small windows by scalar multiply-adds; see src/scalar_forward.cuh.

For float32, whose exact products no matrix unit has: `flash` multiplies tiles of 64 queries by every key that one of
them sees, four times as many pairs as count with 7 x 7. And for sequences with windows of a few keys, in any type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch

from kernels.backend import BoundForward, Operands
from kernels.cuda import bound, runtime
from kernels.cuda.arguments import (
    FLOAT,
    GEOMETRY,
    INT,
    MAP_LIMIT,
    POINTER,
    TENSOR,
    Struct,
    allows_tf32,
    pack_geometry,
    pack_tensor,
    padded_axes,
    why_not_near,
)
from kernels.cuda.bound import Launch
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.nat_layers import nat_layer
from kernels.problem import Axis, Problem

SCALAR_FORWARD = Struct(
    "ScalarForwardArguments",
    "src/scalar_forward.cuh",
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    output=POINTER,
    lse=POINTER,
    rpb=POINTER,
    geometry=GEOMETRY,
    rows=INT,
    column_groups=INT,
    tile_groups=INT,
    column_tiles=INT,
    scale_log2e=FLOAT,
)
_set_pointers = SCALAR_FORWARD.pointers()

MAX_WINDOW = 13
"""Keys along an axis: beyond, tiles waste little, and a kernel holds the scores of a row in registers."""
MAX_KEYS_OF_HALVES, LEAST_CHANNELS_OF_HALVES = 9, 24
"""In 16 bits: with more keys the matrix units are faster, with fewer channels half of the lanes have none."""
MAX_HEAD_DIM = 64
TABLE_BYTES = 40 << 10
QUERIES, MARGIN, THREADS = 4, 3, 128


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`'s forward pass, in one sentence; None if it does."""
    if problem.dtype is not torch.float32 and (problem.rank != 1 or problem.window_size > MAX_KEYS_OF_HALVES):
        return f"scalar takes float32, or sequences with windows of at most {MAX_KEYS_OF_HALVES} keys"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"scalar computes in float32; this is {problem.dtype}"
    if problem.dtype is not torch.float32 and problem.head_dim < LEAST_CHANNELS_OF_HALVES:
        return f"scalar takes head dims from {LEAST_CHANNELS_OF_HALVES} in 16 bits; this is {problem.head_dim}"
    if max(problem.window) > MAX_WINDOW:
        return f"scalar takes windows up to {MAX_WINDOW} keys an axis; this one is {problem.window}"
    if problem.head_dim != problem.value_dim or problem.head_dim > MAX_HEAD_DIM:
        return (
            f"scalar takes head dims up to {MAX_HEAD_DIM}, equal for query and value; "
            f"these are {problem.head_dim}, {problem.value_dim}"
        )
    if problem.head_dim * problem.dtype.itemsize % 16:
        return f"scalar reads tokens by 16 bytes; a head_dim of {problem.head_dim} is no multiple"
    if any(axis.stride != 1 for axis in problem.axes) or any(axis.causal for axis in problem.axes[:-1]):
        return "scalar knows no stride, and causal masking along the last axis alone"
    if problem.additional:
        return "scalar knows no additional keys"
    if not math.isfinite(problem.scale):
        return f"scalar needs a finite scale; it is {problem.scale}"
    if _table_bytes(problem) > TABLE_BYTES:
        return f"scalar holds a bias of at most {TABLE_BYTES} bytes; this takes {_table_bytes(problem)}"
    rows, column_groups = _rows(problem), _column_groups(problem)
    if rows >= MAP_LIMIT or column_groups >= MAP_LIMIT or _blocks(problem, _tile_groups(problem)) > runtime.MAX_GRID:
        return "scalar would need more blocks than a grid has"
    return None


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why the tensors do not suit the kernel, or settings suit another better, in one sentence; None if they do."""
    if problem.dtype is torch.float32 and allows_tf32():
        return "with TF32 allowed, matrix units are faster on dense groups and as fast on others"
    return why_not_near(query=operands.query, key=operands.key, value=operands.value)


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """Of problems and tensors that `why_not` and `why_not_operands` accept. See kernels.backend.bind_forward."""
    strides = (operands.query.stride(), operands.key.stride(), operands.value.stride())
    packed = _packed(problem, *strides)
    grid = _blocks(problem, _tile_groups(problem))
    launch = Launch(source_of(problem), grid, _table_bytes(problem), packed, _set_pointers).bind(problem.device)
    return bound.forward(problem, launch)


@functools.lru_cache(maxsize=1024)
def _packed(problem: Problem, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> bytes:
    tile_groups = _tile_groups(problem)
    _, row_axis, column_axis = padded_axes(problem)
    return SCALAR_FORWARD.pack(
        query=pack_tensor(query, problem.rank),
        key=pack_tensor(key, problem.rank),
        value=pack_tensor(value, problem.rank),
        geometry=pack_geometry(problem),
        rows=row_axis.group_length(0),
        column_groups=_groups_of(column_axis),
        tile_groups=tile_groups,
        column_tiles=-(-_column_groups(problem) // tile_groups),
        scale_log2e=problem.scale * math.log2(math.e),
    )


def _groups_of(axis: Axis) -> int:
    """Groups of queries along the longest dilation group."""
    return -(-axis.group_length(0) // QUERIES)


def _column_groups(problem: Problem) -> int:
    """Groups of queries along the last axis, those of all dilation groups."""
    axis = problem.axes[-1]
    return axis.dilation * _groups_of(axis)


def _rows(problem: Problem) -> int:
    """Rows of all maps, those of all dilation groups."""
    planes, rows, _ = padded_axes(problem)
    return problem.batch * planes.length * rows.dilation * rows.group_length(0)


def _columns(problem: Problem) -> int:
    """The most that a group of queries sees along the last axis."""
    axis = problem.axes[-1]
    return min(axis.window + QUERIES - 1, axis.group_length(0))


def _blocks_on_an_sm(problem: Problem) -> int:
    """Three leave a thread 168 registers, two 255. Three are faster by a tenth where nothing spills then."""
    fits = problem.has_rpb and _columns(problem) <= 10 and problem.head_dim <= 32
    return 3 if problem.dtype.itemsize == 2 or problem.head_dim <= 16 or fits else 2


def _members(problem: Problem) -> int:
    """Groups of queries of a block."""
    return THREADS // (8 if problem.head_dim > 32 else 4)


@functools.lru_cache(maxsize=1024)
def _tile_groups(problem: Problem) -> int:
    """Groups of columns of a block's tile: of the powers of two, what leaves the fewest keys to be read in all.

    A block reads what its queries see once, if the first cache holds it.
    """
    members = _members(problem)
    _, row_axis, column_axis = padded_axes(problem)

    def keys_read(tile: int) -> int:
        rows, columns = members // tile, QUERIES * tile
        return _blocks(problem, tile) * (rows + row_axis.window - 1) * (columns + column_axis.window - 1)

    return min((tile for tile in (1, 2, 4, 8, 16, 32) if members % tile == 0), key=keys_read)


def _blocks(problem: Problem, tile_groups: int) -> int:
    rows = _members(problem) // tile_groups
    return problem.heads * -(-_rows(problem) // rows) * -(-_column_groups(problem) // tile_groups)


def _table_bytes(problem: Problem) -> int:
    """Shared memory: the bias of one head, lines of the last axis with a margin at both ends."""
    if not problem.has_rpb:
        return 0
    *lines, offsets = problem.rpb_shape[1:]
    return 4 * math.prod(lines) * (offsets + 2 * MARGIN)


def source_of(problem: Problem) -> KernelSource:
    config = instantiate(
        "ScalarForwardConfig",
        problem.dtype,
        problem.rpb_dtype or torch.float32,
        problem.has_rpb,
        problem.head_dim,
        _columns(problem),
        THREADS,
    )
    return KernelSource(
        header="src/scalar_forward.cuh",
        function="scalar_forward",
        config=config,
        arguments="ScalarForwardArguments",
        threads=THREADS,
        min_blocks=_blocks_on_an_sm(problem),
        shared_bytes=_table_bytes(problem),
    )


def representative_sources() -> Iterable[KernelSource]:
    """The layers of the published models in float32, sliding and dense, wider heads and windows, and sequences."""
    for problem in (
        nat_layer(28, torch.float32),
        nat_layer(7, torch.float32),
        nat_layer(28, torch.float32, rpb=False),
        nat_layer(28, torch.float32, head_dim=64),
        nat_layer(28, torch.float32, window=11),
        nat_layer(28, torch.float32, window=13),
    ):
        yield source_of(problem)
    for dtype, head_dim in ((torch.bfloat16, 24), (torch.float16, 32), (torch.float32, 12), (torch.bfloat16, 64)):
        problem = Problem(
            batch=1,
            axes=(Axis(8192, 5),),
            heads=2,
            key_heads=2,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5,
            dtype=dtype,
            device=torch.device("cuda"),
        )
        yield source_of(problem)
