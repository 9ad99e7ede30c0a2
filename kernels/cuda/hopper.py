"""`hopper`: large windows on sm_90a, forward. Tensor copies and wgmma; see src/hopper_forward.cuh."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from kernels.backend import BoundForward, Operands
from kernels.cuda import bound, hopper_tiles
from kernels.cuda.arguments import GEOMETRY, INT, MAX_RANK, POINTER, TENSOR, Struct, pack_contiguous
from kernels.cuda.hopper_launch import TENSOR_MAP, bind, extras_config, launch_of, map_additional, map_box, source_of
from kernels.cuda.hopper_tiles import Bias, Tiles, bias_of, tiles_of, why_no_tiles
from kernels.cuda.jit import KernelSource
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
_set = HOPPER_FORWARD.pointers("query", "key", "value", "output.data", "lse", "rpb")
_set_with_additional = HOPPER_FORWARD.pointers()

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
    return source_of("hopper_forward", tiles, *config)


def _shared_bytes(head_dim: int, tiles: Tiles) -> int:
    barriers = 8 * (1 + 4 * tiles.stages)
    boxes = 2 * tiles.stages * tiles.box_bytes(head_dim)
    return tiles.rows_bytes(head_dim) + boxes + barriers + tiles.windows_bytes


def _tiles(problem: Problem) -> Tiles | None:
    shared_bytes = functools.partial(_shared_bytes, problem.head_dim)
    choices = (
        tiles_of(problem, groups, most, STAGES, shared_bytes, resident)
        for groups, most, resident in shapes(problem.head_dim, problem.window_size)
    )
    return next((tiles for tiles in choices if tiles is not None), None)


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """Of problems and tensors that `why_not` and `why_not_operands` accept. See kernels.backend.bind_forward."""
    tiles, bias = _tiles(problem), bias_of(problem)
    assert tiles is not None, "why_not accepts the problem"
    launch = launch_of(
        problem,
        HOPPER_FORWARD,
        _set_with_additional if problem.additional else _set,
        _source(tiles, problem.dtype, problem.head_dim, bias, problem.additional > 0),
        tiles,
        problem.heads,
        _shared_bytes(problem.head_dim, tiles),
        bias,
        output=pack_contiguous(problem, problem.heads, problem.value_dim),
    )
    boxes = ((operands.query, tiles.rows), (operands.key, tiles.columns), (operands.value, tiles.columns))
    maps = [map_box(problem, tensor, box) for tensor, box in boxes]
    if problem.additional:
        maps += [map_additional(problem, t, tiles) for t in (operands.additional_keys, operands.additional_values)]
    return bound.forward(problem, bind(launch, problem, maps))


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
