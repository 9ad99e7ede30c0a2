"""`hopper_backward`: gradients for large windows on sm_90a, the same bits every time. See src/hopper_gradient.cuh.

Three launches: what every query needs besides its vectors (hopper_statistics.cuh), the gradient of the queries, and
the gradients of keys and values; above a head_dim of 128 these two go one by one. Where the gradient of a bias is
wanted, the flash kernel that sums it up computes that of the queries too. So does one for additional keys and values:
few rows that every query of the map sees, whose sums must be spread over the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Gradients, Operands
from kernels.cuda import arguments, flash, hopper_tiles, runtime
from kernels.cuda.arguments import GEOMETRY, INT, MAX_RANK, POINTER, TENSOR, Struct, aligned
from kernels.cuda.hopper_tiles import (
    TENSOR_MAP,
    Bias,
    Tiles,
    bias_of,
    choose_tiles,
    extras_config,
    map_additional,
    map_tensor,
    room_beside,
    why_no_tiles,
)
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Problem

HOPPER_STATISTICS = Struct(
    "HopperStatisticsArguments",
    header="src/hopper_statistics.cuh",
    geometry=GEOMETRY,
    output=TENSOR,
    grad_output=TENSOR,
    lse=POINTER,
    grad_lse=POINTER,
    statistics=POINTER,
    blocks=INT,
)
_set_statistics = HOPPER_STATISTICS.pointers("output.data", "grad_output.data", "lse", "grad_lse", "statistics")
HOPPER_GRADIENT = Struct(
    "HopperGradientArguments",
    header="src/hopper_gradient.cuh",
    first_rows=TENSOR_MAP,
    second_rows=TENSOR_MAP,
    first_columns=TENSOR_MAP,
    second_columns=TENSOR_MAP,
    additional_keys=TENSOR_MAP,
    additional_values=TENSOR_MAP,
    column_statistics=TENSOR_MAP,
    row_statistics=POINTER,
    grad_first=TENSOR,
    grad_second=TENSOR,
    geometry=GEOMETRY,
    tiles=INT.array(MAX_RANK),
    rpb=POINTER,
)
_set_gradient = HOPPER_GRADIENT.pointers("row_statistics", "grad_first.data", "grad_second.data", "rpb")

ARCHITECTURES = ("sm_90a",)
STAGES = 3
MOST_SUMMED_TOGETHER = 128  # head_dim up to which registers hold the gradients of 64 keys and of their values
STATISTICS = 4  # floats per query
_STATISTICS_THREADS = 256


@dataclass(frozen=True, slots=True)
class Part:
    """A launch: whether rows are keys, and which of their gradients it sums up (see HopperGradientConfig)."""

    keys: bool
    first: bool
    second: bool


QUERY = Part(keys=False, first=True, second=False)
KEY_AND_VALUE = Part(keys=True, first=True, second=True)
KEY = Part(keys=True, first=True, second=False)
VALUE = Part(keys=True, first=False, second=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """Warpgroups of a block, the largest box of columns, and whether products queue: see HopperGradientConfig.

    A thread holds, of its 64 rows, one or two gradients (head_dim / 2 registers each), and of a box its scores, their
    slopes (columns / 2 each), and what is multiplied in a second product (columns / 4 each); the last two not at once
    where products do not queue.
    """

    groups: int
    columns: int
    queued: bool


def shape_of(head_dim: int, part: Part) -> Shape:
    """What registers and shared memory allow."""
    if head_dim > 192:
        return Shape(2, 32 if part.first else 48, queued=False)
    if head_dim > MOST_SUMMED_TOGETHER:
        return Shape(2, 64, queued=False)
    if not part.keys:
        return Shape(2, 128 if head_dim <= 64 else 112, queued=head_dim < 128)
    if head_dim <= 64:
        return Shape(2, 112, queued=head_dim <= 32)
    return Shape(2, 96 if head_dim <= 96 else 64, queued=False)


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve the backward pass, in one sentence; None where it does."""
    reason = hopper_tiles.why_not(problem)
    if reason is None and any(_tiles(problem, part) is None for part in parts(problem)):
        return why_no_tiles(problem)
    return reason


def why_not_gradient(operands: Operands, grad_output: Tensor) -> str | None:
    """Why tensor copies cannot read these tensors, in a few words; None where they can."""
    return hopper_tiles.why_not_operands(operands) or hopper_tiles.why_not_tensor("grad_output", grad_output)


def _source(
    tiles: Tiles, dtype: torch.dtype, head_dim: int, part: Part, bias: Bias | None = None, additional: bool = False
) -> KernelSource:
    config = [tiles.config(dtype, head_dim, inverse=part.keys), tiles.registers, shape_of(head_dim, part).queued]
    config += [part.first, part.second, *extras_config(bias, additional)]
    return KernelSource(
        "src/hopper_gradient.cuh",
        "hopper_gradient",
        instantiate("HopperGradientConfig", *config),
        "HopperGradientArguments",
        tiles.threads,
        tiles.resident,
    )


def _statistics_source(dtype: torch.dtype, head_dim: int) -> KernelSource:
    return KernelSource(
        "src/hopper_statistics.cuh",
        "hopper_statistics",
        instantiate("HopperStatisticsConfig", dtype, head_dim, _STATISTICS_THREADS),
        "HopperStatisticsArguments",
        _STATISTICS_THREADS,
    )


def _shared_bytes(tiles: Tiles, head_dim: int, part: Part, bias: Bias | None = None) -> int:
    second_stages = tiles.stages if part.second else min(tiles.stages, 2)
    stages = tiles.stages + second_stages
    rows = tiles.rows_bytes(head_dim) + (tiles.rows_bytes(head_dim) if part.first else 1024)
    statistics = 4 * STATISTICS * (second_stages * math.prod(tiles.columns) if part.keys else 1)
    used = rows + stages * tiles.box_bytes(head_dim) + statistics + 8 * (1 + 2 * stages) + tiles.windows_bytes
    return -(-used // 16) * 16 + (0 if bias is None else bias.bytes(tiles.rows, tiles.columns))


def parts(problem: Problem) -> tuple[Part, ...]:
    """The launches that compute a problem's gradients."""
    return (QUERY, KEY_AND_VALUE) if problem.head_dim <= MOST_SUMMED_TOGETHER else (QUERY, KEY, VALUE)


def _tiles(problem: Problem, part: Part) -> Tiles | None:
    shape, bias = shape_of(problem.head_dim, part), bias_of(problem, part.keys)
    axes, shared_bytes = (
        arguments.padded_axes(problem),
        functools.partial(_shared_bytes, head_dim=problem.head_dim, part=part),
    )
    room = room_beside(bias, problem, shape.groups, STAGES, shared_bytes)
    return choose_tiles(axes, shape.groups, shape.columns, STAGES, inverse=part.keys, room=room)


@functools.lru_cache(maxsize=1024)
def _statistics_plan(
    problem: Problem, output: tuple[int, ...], grad_output: tuple[int, ...]
) -> tuple[KernelSource, int, bytes]:
    lanes = next(lanes for lanes in (2, 4, 8, 16, 32) if 8 * lanes >= problem.head_dim)
    blocks = -(-problem.tokens * problem.heads * lanes // _STATISTICS_THREADS)
    packed = HOPPER_STATISTICS.pack(
        geometry=arguments.pack_geometry(problem),
        output=arguments.pack_tensor(output, problem.rank),
        grad_output=arguments.pack_tensor(grad_output, problem.rank),
        blocks=blocks,
    )
    return _statistics_source(problem.dtype, problem.head_dim), problem.batch * blocks, packed


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, part: Part, grad_strides: tuple[int, ...]) -> tuple[KernelSource, int, int, bytes, Tiles]:
    axes = arguments.padded_axes(problem)
    tiles = _tiles(problem, part)
    assert tiles is not None, "why_not accepts the problem"
    counts = tiles.counts(axes)
    grad = arguments.pack_tensor(grad_strides, problem.rank)
    packed = HOPPER_GRADIENT.pack(
        first_rows=b"",
        second_rows=b"",
        first_columns=b"",
        second_columns=b"",
        additional_keys=b"",
        additional_values=b"",
        column_statistics=b"",
        grad_first=grad,
        grad_second=grad,
        geometry=arguments.pack_geometry(problem),
        tiles=counts,
    )
    heads = problem.key_heads if part.keys else problem.heads
    grid = math.prod(counts) * math.prod(problem.dilation) * heads * problem.batch
    specifics = problem.head_dim, part, bias_of(problem, part.keys)
    source = _source(tiles, problem.dtype, *specifics, additional=problem.additional > 0 and not part.keys)
    return source, grid, _shared_bytes(tiles, *specifics), packed, tiles


def _launch(
    problem: Problem,
    part: Part,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    additional: tuple[Tensor | None, Tensor | None],
    statistics: Tensor,
    rpb: Tensor | None,
    grads: tuple[Tensor, Tensor | None],
) -> None:
    """Writes the gradients of `rows` that the part is about; `columns` is what its rows see, or what sees them.

    `additional` keys and values are seen besides, where rows are queries.
    """
    first, second = grads
    source, grid, shared_bytes, packed, tiles = _plan(problem, part, first.stride())
    tensors = ((rows[0], tiles.rows), (rows[1], tiles.rows), (columns[0], tiles.columns), (columns[1], tiles.columns))
    maps = b"".join(map_tensor(tensor, box, problem.dilation) for tensor, box in tensors)
    maps += b"".join(map_additional(None if part.keys else tensor, tiles) for tensor in additional)
    if part.keys:
        maps += map_tensor(statistics, tiles.columns, problem.dilation)
    packed = maps + packed[len(maps) :]
    addresses = (0 if t is None else t.data_ptr() for t in (statistics, first, second, rpb))
    runtime.kernel(source, problem.device).launch(grid, shared_bytes, _set_gradient(packed, *addresses))


def statistics_of(
    problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None
) -> Tensor:
    """`[batch, *space, heads, 4]` float32: lse times log2(e), delta, and two zeros."""
    output, lse = aligned(output.contiguous()), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    statistics = lse.new_empty((*lse.shape, STATISTICS), dtype=torch.float32)
    source, grid, packed = _statistics_plan(problem, output.stride(), grad_output.stride())
    addresses = [0 if t is None else t.data_ptr() for t in (output, grad_output, lse, grad_lse, statistics)]
    runtime.kernel(source, problem.device).launch(grid, 0, _set_statistics(packed, *addresses))
    return statistics


def backward(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> Gradients:
    """Gradients of the operands of a problem and tensors that `why_not` and `why_not_gradient` accept."""
    statistics = statistics_of(problem, output, lse, grad_output, grad_lse)
    rpb = None if operands.rpb is None else operands.rpb.contiguous()
    of_queries, of_keys = (operands.query, grad_output), (operands.key, operands.value)
    additional = operands.additional_keys, operands.additional_values
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (operands.query, operands.key, operands.value))
    lse, delta, grad_rpb = lse.contiguous(), statistics[..., 1], None
    if needs_rpb_grad:
        query_gradient = flash.bind_query_gradient(problem, operands, grad_output, needs_rpb_grad)
        grad_query, grad_rpb, delta = query_gradient(*operands.tensors, output, lse, grad_output, grad_lse)
    else:
        _launch(problem, QUERY, of_queries, of_keys, additional, statistics, rpb, (grad_query, None))
    for part in parts(problem)[1:]:
        _launch(problem, part, of_keys, of_queries, additional, statistics, rpb, (grad_key, grad_value))
    if not problem.additional:
        return Gradients(grad_query, grad_key, grad_value, grad_rpb)
    additional_gradients = flash.bind_additional_gradients(problem, operands, grad_output)
    of_additional = additional_gradients(operands.query, *additional, lse, delta.contiguous(), grad_output)
    return Gradients(grad_query, grad_key, grad_value, grad_rpb, *of_additional)


def representative_sources() -> Iterable[KernelSource]:
    """One configuration per rank and class of head_dim, for the compile check; sm_90a only."""
    for dtype in (torch.float16, torch.bfloat16):
        yield _statistics_source(dtype, 128)
        for head_dim in (32, 64, 96, 128, 192, 256):
            for part in (QUERY, KEY_AND_VALUE) if head_dim <= MOST_SUMMED_TOGETHER else (QUERY, KEY, VALUE):
                shape = shape_of(head_dim, part)
                tiles = Tiles((1, 8, 8), (1, 1, shape.groups), (1, shape.columns // 8, 8), STAGES)
                yield _source(tiles, dtype, head_dim, part)
                if dtype == torch.bfloat16:
                    yield _source(tiles, dtype, head_dim, part, Bias(torch.float32, (1, 13, 13)))
                    if not part.keys:
                        yield _source(tiles, dtype, head_dim, part, additional=True)
                        yield _source(tiles, dtype, head_dim, part, Bias(torch.float32, (1, 13, 13)), additional=True)
        for rows, columns in (((1, 1, 64), (1, 1, 48)), ((8, 8, 1), (6, 1, 8))):
            for part in (QUERY, KEY_AND_VALUE):
                yield _source(Tiles(rows, (1, 1, 2), columns, STAGES), dtype, 128, part)
