"""`hopper_strip`: small sliding 2-D windows on sm_90a, forward: tensor copies and wgmma. src/hopper_strip_forward.cuh.

Blocks stay on their SM and walk down strips of maps, each of one head. So this family is for many maps; `strip` serves
the others, and all that row blocks of 8 rows do not suit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kernels.backend import BoundForward, Operands
from kernels.cuda import bound, runtime
from kernels.cuda.arguments import FLOAT, GEOMETRY, INT, POINTER, Struct, pack_geometry
from kernels.cuda.bound import Launch
from kernels.cuda.hopper_launch import TENSOR_MAP, bind, map_rows
from kernels.cuda.hopper_tiles import why_not_tensor
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.runtime import DeviceProperties
from kernels.cuda.strip import DTYPES, HEAD_DIMS, SMALLEST_SCALE
from kernels.problem import Axis, Problem

WALKS = Struct("StripWalks", "fastna/hopper_strip.cuh", blocks=INT, count=INT, strips=INT, steps=INT, tiles=INT)
HOPPER_STRIP_FORWARD = Struct(
    "HopperStripForwardArguments",
    "src/hopper_strip_forward.cuh",
    query=TENSOR_MAP,
    key=TENSOR_MAP,
    value=TENSOR_MAP,
    output=POINTER,
    lse=POINTER,
    rpb=POINTER,
    geometry=GEOMETRY,
    walks=WALKS,
    inverse_scale=FLOAT,
    scale_log2e=FLOAT,
)
_set_pointers = HOPPER_STRIP_FORWARD.pointers()

ARCHITECTURES = ("sm_90a",)
WINDOWS = (3, 5, 7)
SIDE = 8  # of a tile
LOG2_E = math.log2(math.e)
MOST_TILES = {32: 4, 64: 2}
"""Tiles of a strip, by head_dim: with more of them shared memory holds too few row blocks ahead of the one in use."""
GROUPS = {32: 4, 64: 3}
"""Warpgroups that multiply, by head_dim: as many as have registers enough."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Tiles side by side, and what a block has of them: row blocks and steps of queries in its rings, warpgroups."""

    tiles: int
    stages: int
    query_stages: int
    groups: int

    @property
    def threads(self) -> int:
        """One warpgroup copies, the others multiply."""
        return 128 * (1 + self.groups)

    @property
    def registers(self) -> int:
        """Of a thread that multiplies: those of a thread that copies keep 24."""
        return min((65536 // 128 - 24) // self.groups // 8 * 8, 240)


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve the forward pass, in one sentence; None where it does."""
    reason = why_no_shape(problem)
    if reason:
        return reason
    device = runtime.properties(problem.device)
    strip = choose_strip(problem, device)
    if strip is None:
        return "shared memory does not hold its rings"
    walks = problem.batch * problem.heads * -(-problem.space[1] // (SIDE * strip.tiles))
    if walks < device.multiprocessors:
        return f"it is for as many walks down a map as there are SMs, {device.multiprocessors}, not {walks}"
    return None


def why_no_shape(problem: Problem) -> str | None:
    """Why tiles and row blocks do not suit a problem, forward or backward, in one sentence; None where they do."""
    reason = runtime.why_not_here(problem)
    if reason:
        return reason
    if runtime.properties(problem.device).capability != (9, 0):
        return "it needs compute capability 9.0"
    if problem.rank != 2:
        return f"it takes 2-D problems, not rank {problem.rank}"
    if problem.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {problem.dtype}"
    if problem.head_dim != problem.value_dim or problem.head_dim not in HEAD_DIMS:
        return f"it takes one head_dim of {HEAD_DIMS}, not {problem.head_dim} and {problem.value_dim}"
    if problem.key_heads != problem.heads:
        return f"it takes a key head for every head, not {problem.key_heads} for {problem.heads}"
    if any(axis.causal or axis.stride != 1 or axis.dilation != 1 for axis in problem.axes):
        return "it knows no causal masking, no stride and no dilation"
    if any(window not in WINDOWS for window in problem.window):
        return f"it takes windows of {WINDOWS}, not {problem.window}"
    if problem.additional:
        return "it knows no additional keys"
    if not SMALLEST_SCALE <= problem.scale < float("inf"):
        return f"it needs a finite scale of at least {SMALLEST_SCALE}, not {problem.scale}"
    for axis in problem.axes:
        if not suits(axis.length, axis.window):
            return (
                f"the last {axis.length % SIDE} of {axis.length} tokens have windows that begin before their row block"
            )
    return None


def suits(length: int, window: int) -> bool:
    """Whether the windows of every tile of 8 tokens, inverse ones too, lie within its two row blocks."""
    return length % SIDE == 0 or length % SIDE > window // 2


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why tensor copies cannot read these tensors, in a few words; None where they can."""
    for name in ("query", "key", "value"):
        if reason := why_not_tensor(name, getattr(operands, name)):
            return reason
    return None


def choose_strip(problem: Problem, device: DeviceProperties) -> Strip | None:
    """Strips of equal width, at most `MOST_TILES`, and as many row blocks in shared memory as it holds."""
    tiles = -(-problem.space[1] // SIDE)
    strips = -(-tiles // MOST_TILES[problem.head_dim])
    width = -(-tiles // strips)
    for stages, query_stages in ((6, 4), (5, 3), (4, 2), (3, 2), (3, 1)):
        strip = Strip(width, stages, query_stages, GROUPS[problem.head_dim])
        if shared_bytes(problem, strip) <= device.shared_memory:
            return strip
    return None


def shared_bytes(problem: Problem, strip: Strip) -> int:
    """sizeof HopperStripForward::Shared."""
    column = SIDE * problem.head_dim * 2
    rows, columns = problem.window
    block = (strip.tiles * SIDE + columns - 1) * column
    line = (3 * SIDE - 2) * 8
    bias = rows * 2 * columns * line + 3 * 32 * 4
    barriers = 8 * 2 * (strip.stages + strip.query_stages)
    return 2 * strip.stages * block + strip.query_stages * strip.tiles * SIDE * column + bias + barriers


def pack_walks(problem: Problem, strip: Strip, device: DeviceProperties) -> tuple[bytes, int]:
    """StripWalks, and the grid: as many blocks as SMs, or fewer, so that every head has as many."""
    tiles = -(-problem.space[1] // SIDE)
    strips = -(-tiles // strip.tiles)
    count = problem.batch * strips
    blocks = min(max(device.multiprocessors // (problem.heads * strips), 1) * strips, count)
    packed = WALKS.pack(blocks=blocks, count=count, strips=strips, steps=-(-problem.space[0] // SIDE), tiles=tiles)
    return packed, problem.heads * blocks


def _shape(problem: Problem, strip: Strip) -> str:
    return instantiate("StripShape", problem.dtype, problem.head_dim, *problem.window, strip.tiles)


def source_of(problem: Problem, strip: Strip) -> KernelSource:
    config = instantiate(
        "HopperStripForwardConfig",
        _shape(problem, strip),
        problem.rpb_dtype or torch.float32,
        problem.has_rpb,
        strip.groups,
        strip.stages,
        strip.query_stages,
        strip.registers,
    )
    return KernelSource(
        header="src/hopper_strip_forward.cuh",
        function="hopper_strip_forward",
        config=config,
        arguments="HopperStripForwardArguments",
        threads=strip.threads,
        shared_bytes=shared_bytes(problem, strip),
    )


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """Of problems and tensors that `why_not` and `why_not_operands` accept. See kernels.backend.bind_forward."""
    device = runtime.properties(problem.device)
    strip = choose_strip(problem, device)
    assert strip is not None, "why_not accepts the problem"
    walks, grid = pack_walks(problem, strip, device)
    packed = HOPPER_STRIP_FORWARD.pack(
        geometry=pack_geometry(problem),
        walks=walks,
        inverse_scale=1.0 / problem.scale,
        scale_log2e=problem.scale * LOG2_E,
    )
    launch = Launch(source_of(problem, strip), grid, shared_bytes(problem, strip), packed, _set_pointers)
    width = strip.tiles * SIDE
    widths = (width, width + problem.window[1] - 1, width + problem.window[1] - 1)
    tensors = (operands.query, operands.key, operands.value)
    maps = [map_rows(problem, tensor, columns) for tensor, columns in zip(tensors, widths, strict=True)]
    return bound.forward(problem, bind(launch, problem, maps))


def representative_sources() -> Iterable[KernelSource]:
    """The sliding layers of the published models (kernel size 7, with bias) and the neighbouring cases; sm_90a only."""
    device = DeviceProperties(capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)

    def source(
        length: int, dtype: torch.dtype, *, head_dim: int = 32, window: int = 7, rpb: bool = True
    ) -> KernelSource:
        problem = Problem(
            batch=128,
            axes=(Axis(length, window),) * 2,
            heads=112 // length,
            key_heads=112 // length,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5,
            dtype=dtype,
            device=torch.device("cuda"),
            rpb_dtype=torch.float32 if rpb else None,
        )
        strip = choose_strip(problem, device)
        assert strip is not None, "its rings fit"
        return source_of(problem, strip)

    for length in (56, 28, 14):
        yield source(length, torch.bfloat16)
    yield source(28, torch.float16)
    yield source(14, torch.bfloat16, head_dim=64)
    yield source(56, torch.bfloat16, rpb=False)
    yield source(28, torch.bfloat16, window=5)
    yield source(28, torch.bfloat16, window=3)
