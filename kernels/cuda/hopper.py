"""`hopper`: large windows on sm_90a, forward. Tensor copies and wgmma; see src/hopper_forward.cuh."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.backend import Operands
from kernels.cuda import arguments, hopper_tiles, runtime
from kernels.cuda.arguments import GEOMETRY, INT, MAX_RANK, POINTER, TENSOR, Struct
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

HOPPER_FORWARD = Struct(
    "HopperForwardArguments",
    header="src/hopper_forward.cuh",
    query=TENSOR_MAP,
    key=TENSOR_MAP,
    value=TENSOR_MAP,
    additional_keys=TENSOR_MAP,
    additional_values=TENSOR_MAP,
    output=TENSOR,
    lse=POINTER,
    geometry=GEOMETRY,
    tiles=INT.array(MAX_RANK),
    rpb=POINTER,
)
_set_pointers = HOPPER_FORWARD.pointers("output.data", "lse", "rpb")

ARCHITECTURES = ("sm_90a",)
STAGES = 2
SMALL_WINDOW = 256  # keys


def most_keys(head_dim: int) -> tuple[int, int]:
    """Warpgroups of a block and the largest box of keys that fits registers and, in two stages, shared memory."""
    if head_dim <= 64:
        return 3, 112
    if head_dim <= 128:
        return 2, 176
    return 2, 80 if head_dim <= 192 else 64


def shapes(head_dim: int, window_size: int) -> tuple[tuple[int, int, int], ...]:
    """Warpgroups of a block, its largest box of keys, and blocks to an SM: the first that leaves room for a bias.

    Few boxes per block do not fill a pipeline: blocks that hide each other's beginning and end do better there (220
    against 258 microseconds at 13 x 13 keys, docs/kernel-log.md).
    """
    together = (*most_keys(head_dim), 1)
    return ((1, 96, 3), together) if head_dim <= 64 and window_size <= SMALL_WINDOW else (together,)


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve the forward pass, in one sentence; None where it does."""
    reason = hopper_tiles.why_not(problem)
    return why_no_tiles(problem) if reason is None and _tiles(problem) is None else reason


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why tensor copies cannot read these tensors, in a few words; None where they can."""
    return hopper_tiles.why_not_operands(operands)


def _source(
    tiles: Tiles, dtype: torch.dtype, head_dim: int, bias: Bias | None = None, additional: bool = False
) -> KernelSource:
    config = tiles.config(dtype, head_dim, inverse=False), tiles.registers, *extras_config(bias, additional)
    return KernelSource(
        "src/hopper_forward.cuh",
        "hopper_forward",
        instantiate("HopperForwardConfig", *config),
        "HopperForwardArguments",
        tiles.threads,
        tiles.resident,
    )


def _shared_bytes(tiles: Tiles, head_dim: int, bias: Bias | None = None) -> int:
    barriers = 8 * (1 + 4 * tiles.stages)
    boxes = 2 * tiles.stages * tiles.box_bytes(head_dim)
    table = 0 if bias is None else bias.bytes(tiles.rows, tiles.columns)
    return tiles.rows_bytes(head_dim) + boxes + barriers + tiles.windows_bytes + table


def _tiles(problem: Problem) -> Tiles | None:
    axes, bias = arguments.padded_axes(problem), bias_of(problem)
    shared_bytes = functools.partial(_shared_bytes, head_dim=problem.head_dim)
    for groups, most, resident in shapes(problem.head_dim, problem.window_size):
        room = room_beside(bias, problem, groups, STAGES, shared_bytes, resident)
        tiles = choose_tiles(axes, groups, most, STAGES, resident, room=room)
        if tiles is not None:
            return tiles
    return None


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, output_strides: tuple[int, ...]) -> tuple[KernelSource, int, int, bytes, Tiles]:
    axes = arguments.padded_axes(problem)
    tiles = _tiles(problem)
    assert tiles is not None, "why_not accepts the problem"
    counts = tiles.counts(axes)
    grid = math.prod(counts) * math.prod(problem.dilation) * problem.heads * problem.batch
    packed = HOPPER_FORWARD.pack(
        query=b"",
        key=b"",
        value=b"",
        additional_keys=b"",
        additional_values=b"",
        output=arguments.pack_tensor(output_strides, problem.rank),
        geometry=arguments.pack_geometry(problem),
        tiles=counts,
    )
    bias = bias_of(problem)
    source = _source(tiles, problem.dtype, problem.head_dim, bias, problem.additional > 0)
    return source, grid, _shared_bytes(tiles, problem.head_dim, bias), packed, tiles


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """Output and lse of a problem and operands that `why_not` and `why_not_operands` accept."""
    query = operands.query
    shape = query.shape[:-1]
    output = query.new_empty((*shape, problem.value_dim))
    lse = query.new_empty(shape, dtype=torch.float32)
    source, grid, shared_bytes, packed, tiles = _plan(problem, output.stride())
    maps = b"".join(
        map_tensor(tensor, box, problem.dilation)
        for tensor, box in ((query, tiles.rows), (operands.key, tiles.columns), (operands.value, tiles.columns))
    )
    maps += map_additional(operands.additional_keys, tiles) + map_additional(operands.additional_values, tiles)
    packed = maps + packed[len(maps) :]
    kernel = runtime.kernel(source, problem.device)
    rpb = None if operands.rpb is None else operands.rpb.contiguous()
    addresses = output.data_ptr(), lse.data_ptr(), 0 if rpb is None else rpb.data_ptr()
    kernel.launch(grid, shared_bytes, _set_pointers(packed, *addresses))
    return output, lse


def representative_sources() -> Iterable[KernelSource]:
    """One configuration per rank and class of head_dim, for the compile check; sm_90a only."""
    flat, square, cube = (1, 1, 64), (1, 8, 8), (8, 8, 1)
    cases = [
        (32, square, (1, 14, 8)),
        (64, square, (1, 14, 8)),
        (128, square, (1, 22, 8)),
        (128, flat, (1, 1, 176)),
        (128, cube, (6, 1, 24)),
        (192, square, (1, 10, 8)),
        (256, square, (1, 8, 8)),
    ]
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (32, 64):
            yield _source(Tiles(square, (1, 1, 1), (1, 12, 8), STAGES, 3), dtype, head_dim)
        for head_dim, queries, keys in cases:
            tiles = Tiles(queries, (1, 1, most_keys(head_dim)[0]), keys, STAGES)
            yield _source(tiles, dtype, head_dim)
            if dtype == torch.bfloat16:
                windows = (1 if queries[0] == 1 else 7, 1 if queries[1] == 1 else 13, 13)
                yield _source(tiles, dtype, head_dim, Bias(torch.float32, windows))
                yield _source(tiles, dtype, head_dim, additional=True)
