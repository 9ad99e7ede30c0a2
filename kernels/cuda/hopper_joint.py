"""`hopper_joint`: gradients for large windows on sm_90a by one kernel, not the same bits every time.

Four launches: zeros, what every query needs besides its vectors (hopper_statistics.cuh), all gradients, with that of
the queries summed up in float32 (hopper_joint.cuh), and its scaling and rounding (hopper_sums.cuh). Where the gradient
of a bias is wanted, that comes with the queries' from a flash kernel: hopper_backward's way, fewer products in all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.backend import BoundBackward, Gradients, Operands
from kernels.cuda import bound, hopper_backward, hopper_statistics, hopper_tiles
from kernels.cuda.arguments import (
    GEOMETRY,
    INT,
    INT64,
    MAX_RANK,
    POINTER,
    TENSOR,
    Struct,
    address,
    pack_contiguous,
    pack_geometry,
)
from kernels.cuda.bound import Launch
from kernels.cuda.hopper_launch import TENSOR_MAP, bind, extras_config, launch_of, map_box, source_of
from kernels.cuda.hopper_tiles import Bias, Tiles, bias_of, tiles_of
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
HOPPER_SUMS = Struct(
    "HopperSumsArguments",
    header="src/hopper_sums.cuh",
    geometry=GEOMETRY,
    sums=POINTER,
    grad_query=POINTER,
    chunks=INT64,
)
_set_joint, _set_sums = HOPPER_JOINT.pointers(), HOPPER_SUMS.pointers()

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
    shared_bytes = functools.partial(_shared_bytes, problem.head_dim)
    return tiles_of(problem, 2, COLUMNS[problem.head_dim], STAGES, shared_bytes, inverse=True, exact=True)


def _source(tiles: Tiles, dtype: torch.dtype, head_dim: int, bias: Bias | None = None) -> KernelSource:
    registers = (tiles.registers * tiles.groups + 24 - _PRODUCER_REGISTERS) // tiles.groups // 8 * 8
    config = [tiles.config(dtype, head_dim, inverse=True), _PRODUCER_REGISTERS, registers, *extras_config(bias)]
    return source_of("hopper_joint", tiles, *config)


def _sums_source(dtype: torch.dtype, head_dim: int) -> KernelSource:
    config = instantiate("HopperSumsConfig", dtype, head_dim, _SUMS_THREADS)
    return KernelSource("src/hopper_sums.cuh", "hopper_sums", config, "HopperSumsArguments", _SUMS_THREADS)


def _shared_bytes(head_dim: int, tiles: Tiles) -> int:
    columns = math.prod(tiles.columns)
    boxes = 2 * tiles.stages * tiles.box_bytes(head_dim)
    slopes = 2 * tiles.groups * hopper_tiles.ROWS * columns * 2
    sums, statistics = 4 * columns * head_dim, 16 * tiles.stages * columns
    barriers = 8 * (3 + 4 * tiles.stages)
    used = 2 * tiles.rows_bytes(head_dim) + boxes + slopes + sums + statistics + barriers + tiles.windows_bytes
    return -(-used // 16) * 16


def _bind_joint(problem: Problem, operands: Operands, grad_output: Tensor) -> Callable[..., None]:
    """A function of the addresses of the tensors that HopperJointArguments has, in its order."""
    tiles, bias = _tiles(problem), bias_of(problem, keys=True)
    assert tiles is not None, "why_not accepts the problem"
    grad = pack_contiguous(problem, problem.key_heads, problem.head_dim)
    launch = launch_of(
        problem,
        HOPPER_JOINT,
        _set_joint,
        _source(tiles, problem.dtype, problem.head_dim, bias),
        tiles,
        problem.key_heads,
        _shared_bytes(problem.head_dim, tiles),
        bias,
        grad_key=grad,
        grad_value=grad,
    )
    columns = operands.query, grad_output, hopper_statistics.like(problem)
    maps = [map_box(problem, tensor, tiles.rows) for tensor in (operands.key, operands.value)]
    maps += [map_box(problem, tensor, tiles.columns) for tensor in columns]
    return bind(launch, problem, maps)


def _bind_sums(problem: Problem) -> Callable[..., None]:
    """A function of the addresses of the sums and of the queries' gradient."""
    chunks = problem.batch * problem.tokens * problem.heads * problem.head_dim // 8
    packed = HOPPER_SUMS.pack(geometry=pack_geometry(problem), chunks=chunks)
    source = _sums_source(problem.dtype, problem.head_dim)
    return Launch(source, -(-chunks // _SUMS_THREADS), 0, packed, _set_sums).bind(problem.device)


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
    if needs_rpb_grad:
        return hopper_backward.bind_backward(problem, operands, output, lse, grad_output, grad_lse, needs_rpb_grad)
    find_statistics = hopper_statistics.bind(problem, grad_output)
    compute, finish = _bind_joint(problem, operands, grad_output), _bind_sums(problem)
    new_gradients = bound.new_gradients(problem)
    padded_tokens = math.prod(axis.dilation * axis.group_length(0) for axis in problem.axes)
    sums_shape = problem.batch * problem.heads, padded_tokens, problem.head_dim

    def call(*tensors: Any) -> Gradients:
        query, key, value, rpb, _, _, output, lse, grad_output, grad_lse = tensors
        rpb = None if rpb is None else rpb.contiguous()
        statistics = find_statistics(output, lse, grad_output, grad_lse)
        grad_query, *of_keys = (new_gradient() for new_gradient in new_gradients)
        sums = query.new_zeros(sums_shape, dtype=torch.float32)
        compute(*map(address, (key, value, query, grad_output, statistics, *of_keys, sums, rpb)))
        finish(address(sums), address(grad_query))
        return Gradients(grad_query, *of_keys)

    return call


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
