"""`hopper_joint`: gradients for large windows on sm_90a by one kernel, not the same bits every time.

Four launches: zeros, what every query needs besides its vectors (hopper_statistics.cuh), all gradients, with that of
the queries summed up in float32 (hopper_joint.cuh), and its scaling and rounding (hopper_sums.cuh). Where the gradient
of a bias is wanted, that comes with the queries' from a flash kernel: hopper_backward's way, fewer products in all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.backend import Gradients, Operands
from kernels.cuda import arguments, hopper_backward, hopper_tiles, runtime
from kernels.cuda.arguments import GEOMETRY, INT, INT64, MAX_RANK, POINTER, TENSOR, Struct
from kernels.cuda.hopper_tiles import (
    TENSOR_MAP,
    Bias,
    Tiles,
    bias_of,
    choose_tiles,
    extras_config,
    map_tensor,
    room_beside,
)
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Problem

HOPPER_JOINT = Struct(
    "HopperJointArguments",
    header="src/hopper_joint.cuh",
    key=TENSOR_MAP,
    value=TENSOR_MAP,
    query=TENSOR_MAP,
    grad_output=TENSOR_MAP,
    statistics=TENSOR_MAP,
    grad_key=TENSOR,
    grad_value=TENSOR,
    sums=POINTER,
    geometry=GEOMETRY,
    tiles=INT.array(MAX_RANK),
    rpb=POINTER,
)
_set_joint = HOPPER_JOINT.pointers("grad_key.data", "grad_value.data", "sums", "rpb")
HOPPER_SUMS = Struct(
    "HopperSumsArguments",
    header="src/hopper_sums.cuh",
    geometry=GEOMETRY,
    sums=POINTER,
    grad_query=POINTER,
    chunks=INT64,
)
_set_sums = HOPPER_SUMS.pointers("sums", "grad_query")

ARCHITECTURES = ("sm_90a",)
COLUMNS = {32: 128, 64: 128, 128: 64}
"""Queries of a box, per head_dim: 64 per warpgroup, or 64 in all where each warpgroup has a slice of 64 channels."""
STAGES = 2
_PRODUCER_REGISTERS = 40
_SUMS_THREADS = 256


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve the backward pass, in one sentence; None where it does."""
    reason = hopper_backward.why_not(problem) if problem.has_rpb else hopper_tiles.why_not(problem)
    if reason is not None:
        return reason
    if problem.additional:
        return "it takes no additional keys"
    if problem.head_dim not in COLUMNS:
        return f"it takes a head_dim of {', '.join(map(str, COLUMNS))}, not {problem.head_dim}"
    return hopper_tiles.why_no_tiles(problem) if _tiles(problem) is None else None


why_not_gradient = hopper_backward.why_not_gradient


def _tiles(problem: Problem) -> Tiles | None:
    axes, bias = arguments.padded_axes(problem), bias_of(problem, keys=True)
    columns = COLUMNS[problem.head_dim]
    shared_bytes = functools.partial(_shared_bytes, head_dim=problem.head_dim)
    room = room_beside(bias, problem, 2, STAGES, shared_bytes)
    return choose_tiles(axes, 2, columns, STAGES, inverse=True, room=room, exact=True)


def _source(tiles: Tiles, dtype: torch.dtype, head_dim: int, bias: Bias | None = None) -> KernelSource:
    registers = (tiles.registers * tiles.groups + 24 - _PRODUCER_REGISTERS) // tiles.groups // 8 * 8
    config = [tiles.config(dtype, head_dim, inverse=True), _PRODUCER_REGISTERS, registers, *extras_config(bias)]
    return KernelSource(
        "src/hopper_joint.cuh",
        "hopper_joint",
        instantiate("HopperJointConfig", *config),
        "HopperJointArguments",
        tiles.threads,
    )


def _sums_source(dtype: torch.dtype, head_dim: int) -> KernelSource:
    config = instantiate("HopperSumsConfig", dtype, head_dim, _SUMS_THREADS)
    return KernelSource("src/hopper_sums.cuh", "hopper_sums", config, "HopperSumsArguments", _SUMS_THREADS)


def _shared_bytes(tiles: Tiles, head_dim: int, bias: Bias | None = None) -> int:
    columns = math.prod(tiles.columns)
    boxes = 2 * tiles.stages * tiles.box_bytes(head_dim)
    slopes = 2 * tiles.groups * hopper_tiles.ROWS * columns * 2
    sums, statistics = 4 * columns * head_dim, 16 * tiles.stages * columns
    barriers = 8 * (3 + 4 * tiles.stages)
    used = 2 * tiles.rows_bytes(head_dim) + boxes + slopes + sums + statistics + barriers + tiles.windows_bytes
    return -(-used // 16) * 16 + (0 if bias is None else bias.bytes(tiles.rows, tiles.columns))


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, grad_strides: tuple[int, ...]) -> tuple[KernelSource, int, int, bytes, Tiles]:
    axes = arguments.padded_axes(problem)
    tiles = _tiles(problem)
    assert tiles is not None, "why_not accepts the problem"
    counts = tiles.counts(axes)
    grad = arguments.pack_tensor(grad_strides, problem.rank)
    packed = HOPPER_JOINT.pack(
        key=b"",
        value=b"",
        query=b"",
        grad_output=b"",
        statistics=b"",
        grad_key=grad,
        grad_value=grad,
        geometry=arguments.pack_geometry(problem),
        tiles=counts,
    )
    grid = math.prod(counts) * math.prod(problem.dilation) * problem.key_heads * problem.batch
    specifics = problem.head_dim, bias_of(problem, keys=True)
    return _source(tiles, problem.dtype, *specifics), grid, _shared_bytes(tiles, *specifics), packed, tiles


@functools.lru_cache(maxsize=1024)
def _sums_plan(problem: Problem) -> tuple[KernelSource, int, bytes]:
    chunks = problem.batch * problem.tokens * problem.heads * problem.head_dim // 8
    packed = HOPPER_SUMS.pack(geometry=arguments.pack_geometry(problem), chunks=chunks)
    return _sums_source(problem.dtype, problem.head_dim), -(-chunks // _SUMS_THREADS), packed


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
    if needs_rpb_grad:
        return hopper_backward.backward(problem, operands, output, lse, grad_output, grad_lse, needs_rpb_grad)
    query, key, value = operands.query, operands.key, operands.value
    rpb = None if operands.rpb is None else operands.rpb.contiguous()
    statistics = hopper_backward.statistics_of(problem, output, lse, grad_output, grad_lse)
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query, key, value))
    padded_tokens = math.prod(axis.dilation * axis.group_length(0) for axis in problem.axes)
    sums = query.new_zeros((problem.batch * problem.heads, padded_tokens, problem.head_dim), dtype=torch.float32)

    source, grid, shared_bytes, packed, tiles = _plan(problem, grad_key.stride())
    boxes = ((key, tiles.rows), (value, tiles.rows), *((t, tiles.columns) for t in (query, grad_output, statistics)))
    maps = b"".join(map_tensor(tensor, box, problem.dilation) for tensor, box in boxes)
    addresses = map(arguments.address, (grad_key, grad_value, sums, rpb))
    packed = _set_joint(maps + packed[len(maps) :], *addresses)
    runtime.kernel(source, problem.device).launch(grid, shared_bytes, packed)

    source, grid, packed = _sums_plan(problem)
    packed = _set_sums(packed, sums.data_ptr(), grad_query.data_ptr())
    runtime.kernel(source, problem.device).launch(grid, 0, packed)
    return Gradients(grad_query, grad_key, grad_value, None)


def representative_sources() -> Iterable[KernelSource]:
    """One configuration per head_dim and rank, for the compile check; sm_90a only."""
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim, columns in COLUMNS.items():
            tiles = Tiles((1, 8, 8), (1, 1, 2), (1, columns // 8, 8), STAGES)
            yield _source(tiles, dtype, head_dim)
            if dtype == torch.bfloat16:
                yield _source(tiles, dtype, head_dim, Bias(torch.float32, (1, 13, 13)))
                yield _source(tiles, dtype, head_dim, Bias(torch.float32, (1, 13, 13), heads=2))
            yield _sums_source(dtype, head_dim)
        yield _source(Tiles((1, 1, 64), (1, 1, 2), (1, 1, 64), STAGES), dtype, 128)
        yield _source(Tiles((8, 8, 1), (1, 1, 2), (4, 2, 8), STAGES), dtype, 128)
