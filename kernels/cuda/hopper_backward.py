"""`hopper_backward`: gradients for large windows on sm_90a, the same bits every time. See src/hopper_gradient.cuh.

Three launches: what every query needs besides its vectors (hopper_statistics.cuh), the gradient of the queries, and
the gradients of keys and values; above a head_dim of 128 these two go one by one. Where the gradient of a bias is
wanted, the flash kernel that sums it up computes that of the queries too. So does one for additional keys and values:
few rows that every query of the map sees, whose sums must be spread over the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend import BoundBackward, Gradients, Operands
from kernels.cuda import bound, flash, hopper_statistics, hopper_tiles
from kernels.cuda.arguments import GEOMETRY, INT, MAX_RANK, POINTER, TENSOR, Struct, address, pack_contiguous
from kernels.cuda.hopper_launch import (
    TENSOR_MAP,
    bind,
    extras_config,
    launch_of,
    map_additional,
    map_box,
    no_map,
    source_of,
)
from kernels.cuda.hopper_tiles import Bias, Tiles, bias_of, tiles_of, why_no_tiles
from kernels.cuda.jit import KernelSource
from kernels.problem import Problem

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
_set_gradient = HOPPER_GRADIENT.pointers()

ARCHITECTURES = ("sm_90a",)
STAGES = 3
MOST_SUMMED_TOGETHER = 128  # head_dim up to which registers hold the gradients of 64 keys and of their values


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
    return source_of("hopper_gradient", tiles, *config)


def _shared_bytes(head_dim: int, part: Part, tiles: Tiles) -> int:
    second_stages = tiles.stages if part.second else min(tiles.stages, 2)
    stages = tiles.stages + second_stages
    rows = tiles.rows_bytes(head_dim) + (tiles.rows_bytes(head_dim) if part.first else 1024)
    statistics = 4 * hopper_statistics.CHANNELS * (second_stages * math.prod(tiles.columns) if part.keys else 1)
    used = rows + stages * tiles.box_bytes(head_dim) + statistics + 8 * (1 + 2 * stages) + tiles.windows_bytes
    return -(-used // 16) * 16


def parts(problem: Problem) -> tuple[Part, ...]:
    """The launches that compute a problem's gradients."""
    return (QUERY, KEY_AND_VALUE) if problem.head_dim <= MOST_SUMMED_TOGETHER else (QUERY, KEY, VALUE)


def _tiles(problem: Problem, part: Part) -> Tiles | None:
    shape = shape_of(problem.head_dim, part)
    shared_bytes = functools.partial(_shared_bytes, problem.head_dim, part)
    return tiles_of(problem, shape.groups, shape.columns, STAGES, shared_bytes, inverse=part.keys)


def _bind(problem: Problem, part: Part, operands: Operands, grad_output: Tensor) -> Callable[..., None]:
    """A function of the addresses of the tensors that HopperGradientArguments has, in its order."""
    tiles, bias = _tiles(problem, part), bias_of(problem, part.keys)
    assert tiles is not None, "why_not accepts the problem"
    heads = problem.key_heads if part.keys else problem.heads
    additional = (None, None) if part.keys else (operands.additional_keys, operands.additional_values)
    grad = pack_contiguous(problem, heads, problem.head_dim)
    launch = launch_of(
        problem,
        HOPPER_GRADIENT,
        _set_gradient,
        _source(tiles, problem.dtype, problem.head_dim, part, bias, additional[0] is not None),
        tiles,
        heads,
        _shared_bytes(problem.head_dim, part, tiles),
        bias,
        grad_first=grad,
        grad_second=grad,
    )
    of_queries, of_keys = (operands.query, grad_output), (operands.key, operands.value)
    rows, columns = (of_keys, of_queries) if part.keys else (of_queries, of_keys)
    maps = [map_box(problem, tensor, tiles.rows) for tensor in rows]
    maps += [map_box(problem, tensor, tiles.columns) for tensor in columns]
    maps += [map_additional(problem, tensor, tiles) for tensor in additional]
    maps.append(map_box(problem, hopper_statistics.like(problem), tiles.columns) if part.keys else no_map)
    return bind(launch, problem, maps)


def bind_backward(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> BoundBackward:
    """Of problems and tensors that `why_not` and `why_not_gradient` accept. See kernels.backend.bind_backward."""
    find_statistics = hopper_statistics.bind(problem, grad_output)
    query_gradient = _bind_query_gradient(problem, operands, grad_output, needs_rpb_grad)
    key_gradients = [_bind(problem, part, operands, grad_output) for part in parts(problem)[1:]]
    additional_gradients = None
    if problem.additional:
        additional_gradients = flash.bind_additional_gradients(problem, operands, grad_output)
    _, new_key_gradient, new_value_gradient = bound.new_gradients(problem)

    def call(*tensors: Any) -> Gradients:
        query, key, value, rpb, additional_keys, additional_values, output, lse, grad_output, grad_lse = tensors
        rpb, lse = None if rpb is None else rpb.contiguous(), lse.contiguous()
        statistics = find_statistics(output, lse, grad_output, grad_lse)
        grad_query, grad_rpb = query_gradient(statistics, *tensors)
        of_keys = new_key_gradient(), new_value_gradient()
        for launch in key_gradients:
            launch(*map(address, (key, value, query, grad_output, None, None, statistics, None, *of_keys, rpb)))
        if additional_gradients is None:
            return Gradients(grad_query, *of_keys, grad_rpb)
        delta = statistics[..., 1].contiguous()
        of_additional = additional_gradients(query, additional_keys, additional_values, lse, delta, grad_output)
        return Gradients(grad_query, *of_keys, grad_rpb, *of_additional)

    return call


def _bind_query_gradient(
    problem: Problem, operands: Operands, grad_output: Tensor, needs_rpb_grad: bool
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Of the statistics and what a bound backward pass is given: gradients of query and, where wanted, of the bias."""
    if needs_rpb_grad:
        with_rpb = flash.bind_query_gradient(problem, operands, grad_output, needs_rpb_grad)
        return lambda statistics, *tensors: with_rpb(*tensors)[:2]
    launch = _bind(problem, QUERY, operands, grad_output)
    new_gradient, _, _ = bound.new_gradients(problem)

    def call(statistics: Tensor, *tensors: Any) -> tuple[Tensor, None]:
        query, key, value, rpb, additional_keys, additional_values, _, _, grad_output, _ = tensors
        rpb = None if rpb is None else rpb.contiguous()
        grad_query = new_gradient()
        columns = key, value, additional_keys, additional_values
        launch(*map(address, (query, grad_output, *columns, None, statistics, grad_query, None, rpb)))
        return grad_query, None

    return call


def representative_sources() -> Iterable[KernelSource]:
    """One configuration per rank and class of head_dim, for the compile check; sm_90a only."""
    for dtype in (torch.float16, torch.bfloat16):
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
