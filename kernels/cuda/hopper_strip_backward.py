"""Kernel family `hopper_strip`, backward: gradients of small sliding 2-D windows by tensor copies and wgmma (sm_90a).

One kernel computes all gradients in one pass over the operands, without atomics; see src/hopper_strip_backward.cuh. A
block walks down strips of maps of one head. For a head_dim of 64 without a bias: elsewhere other families are faster
(docs/kernel-log.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import BoundBackward, Operands
from kernels.cuda import bound, runtime
from kernels.cuda.arguments import FLOAT, INT, POINTER, Struct, alignment
from kernels.cuda.bound import Launch
from kernels.cuda.dry import HOPPER
from kernels.cuda.hopper_launch import KEPT_MAPS, TENSOR_MAP, MapOf
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.nat_layers import nat_layer
from kernels.cuda.runtime import DeviceProperties
from kernels.cuda.strip_walks import why_no_shape
from kernels.problem import Axis, Problem

ARCHITECTURES = ("sm_90a",)
HEAD_DIM = 64
TILE, LARGEST_WINDOW = 8, 7
MAX_COLUMNS = 1024
"""Of a map: a table in shared memory has an entry for each."""
SLOTS = (4, 3)
"""Row blocks that a ring may hold, best first: two are in use."""
THREADS = 384
PADDING = 16

HOPPER_STRIP_BACKWARD = Struct(
    "HopperStripBackwardArguments",
    "fastna/hopper_strip_backward.cuh",
    query=TENSOR_MAP,
    key=TENSOR_MAP,
    value=TENSOR_MAP,
    output=TENSOR_MAP,
    grad_output=TENSOR_MAP,
    grad_query=POINTER,
    grad_key=POINTER,
    grad_value=POINTER,
    lse=POINTER,
    grad_lse=POINTER,
    heads=INT,
    rows=INT,
    columns=INT,
    walks=INT,
    strips=INT,
    tiles=INT,
    steps=INT,
    lift=INT,
    scale=FLOAT,
    scale_log2=FLOAT,
)
_set_pointers = HOPPER_STRIP_BACKWARD.pointers()


@dataclass(frozen=True, slots=True)
class Cut:
    """How a map is cut, and what a ring holds. The choice changes gradients by rounding only."""

    strips: int
    """Of a map, side by side."""
    slots: int
    """Row blocks that the ring holds."""


@dataclass(frozen=True, slots=True)
class Plan:
    source: KernelSource
    grid: int
    shared_bytes: int
    walks: int
    steps: int
    tiles: int
    box_columns: int


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`'s backward pass, in one sentence; None if it does."""
    reason = why_no_shape(problem)
    if reason:
        return reason
    if problem.head_dim != HEAD_DIM or problem.has_rpb:
        return f"it is for a head_dim of {HEAD_DIM} without a bias, where it is measured to be faster"
    if max(problem.window) > LARGEST_WINDOW or max(problem.dilation) > 1:
        return f"it takes windows of up to {LARGEST_WINDOW} without dilation, not {problem.window}"
    device = runtime.properties(problem.device)
    rows, columns = problem.axes
    if lift_of(rows) is None or not covers_columns(columns):
        return f"hopper_strip's tiles do not cover a map of {problem.space} with windows of {problem.window}"
    cut = choose_cut(problem, device)
    if cut is None:
        return f"hopper_strip needs more shared memory backward than the {device.shared_memory} bytes of a block"
    if problem.batch * problem.heads * cut.strips < device.multiprocessors:
        return "hopper_strip is for more strips of maps than the device has multiprocessors"
    return None


def lift_of(axis: Axis) -> int | None:
    """By how many rows tiles of keys begin before those of queries: see hopper_strip_backward.cuh. None: nothing helps.

    The windows of the queries of each tile, and the queries that see its keys, must lie in two row blocks.
    """
    length, reach = axis.length, axis.window // 2
    if length < TILE:
        return None
    steps = -(-length // TILE)

    def covers(lift: int) -> bool:
        if steps * TILE - lift < length:
            return False
        for step in range(steps):
            begin, end = step * TILE - reach - lift, step * TILE - reach - lift + 2 * TILE
            queries = range(step * TILE, min((step + 1) * TILE, length))
            keys = range(max(step * TILE - lift, 0), min((step + 1) * TILE - lift, length))
            seen = [axis.window_at(query, length) for query in queries] + [axis.queries_at(key, length) for key in keys]
            if any(first < begin or last > end for first, last in seen):
                return False
        return True

    return next((lift for lift in (0, 1) if covers(lift)), None)


def covers_columns(axis: Axis) -> bool:
    """Whether tiles reach all columns that their own see, or are seen from. Pairs of columns must be whole."""
    length, reach = axis.length, axis.window // 2
    if not TILE <= length <= MAX_COLUMNS or length % 2:
        return False
    last = -(-length // TILE) - 1

    def covers(last_begin: int, sees: Callable[[int, int], tuple[int, int]]) -> bool:
        for position in range(length):  # strip_tile
            first = length - TILE if position >= last_begin else position // TILE * TILE
            begin, end = sees(position, length)
            if position < first or begin < first - reach or end > first + TILE + reach:
                return False
        return True

    return covers(last * TILE, axis.window_at) and covers(min(last * TILE, length - axis.window), axis.queries_at)


def why_not_gradient(operands: Operands, grad_output: Tensor) -> str | None:
    """Why tensor copies cannot read these tensors, in one sentence; None if they can."""
    tensors = {"query": operands.query, "key": operands.key, "value": operands.value, "grad_output": grad_output}
    for name, tensor in tensors.items():
        if alignment(tensor) < 16:
            where = f"{name} at address {tensor.data_ptr():#x} with strides {tensor.stride()}"
            return f"{where} is not aligned to 16 bytes"
    return None


def bind_backward(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> BoundBackward:
    """Of problems and tensors that `why_not` and `why_not_gradient` accept; the same bits every time."""
    cut = choose_cut(problem, runtime.properties(problem.device))
    assert cut is not None, "why_not refuses what fits no block"
    chosen = plan(problem, cut, runtime.properties(problem.device))
    packed = pack(problem, cut, chosen)
    start = Launch(chosen.source, chosen.grid, chosen.shared_bytes, packed, _set_pointers).bind(problem.device)
    contiguous = torch.empty(output.shape, dtype=output.dtype, device="meta")
    tensors = (operands.query, operands.key, operands.value, contiguous, grad_output)
    maps = [map_row_block(problem, tensor, chosen.box_columns) for tensor in tensors]

    def launch(*addresses: int) -> None:
        read, rest = addresses[: len(maps)], addresses[len(maps) : -2]  # the last two are those of a bias
        start(*[map_of(address) for map_of, address in zip(maps, read, strict=True)], *rest)

    return bound.backward(problem, launch, 0)


def map_row_block(problem: Problem, tensor: Tensor, columns: int) -> MapOf:
    """Maps for copies of 8 rows of some columns of one head, row by row within a column.

    Of `tensor` and all that lie like it.
    """
    batch, rows, width, heads, channels = tensor.shape
    sizes = [channels, rows, width, heads, batch]
    # A stride that no step takes still has to be a legal one.
    strides = [
        stride if size > 1 else channels
        for size, stride in zip(
            (rows, width, heads, batch),
            (tensor.stride(1), tensor.stride(2), tensor.stride(3), tensor.stride(0)),
            strict=True,
        )
    ]
    box = [channels, TILE, columns, 1, 1]
    swizzle = channels * tensor.element_size()
    encode = runtime.tensor_map_encoder(problem.device, tensor.dtype, sizes, strides, box, [1] * 5, swizzle)
    return functools.lru_cache(maxsize=KEPT_MAPS)(encode)


def pack(problem: Problem, cut: Cut, plan: Plan) -> bytes:
    """The kernel's arguments but for the pointers and maps."""
    rows, columns = problem.space
    lift = lift_of(problem.axes[0])
    assert lift is not None, "why_not refuses lengths that no lift suits"
    return HOPPER_STRIP_BACKWARD.pack(
        heads=problem.heads,
        rows=rows,
        columns=columns,
        walks=plan.walks,
        strips=cut.strips,
        tiles=plan.tiles,
        steps=plan.steps,
        lift=lift,
        scale=problem.scale,
        scale_log2=problem.scale * math.log2(math.e),
    )


@functools.lru_cache(maxsize=1024)
def choose_cut(problem: Problem, device: DeviceProperties) -> Cut | None:
    """The fewest columns brought in, halos included, of which a ring holds four row blocks, or else three.

    Two are in use, a third comes in meanwhile, and its statistics follow: where there is a fourth, nobody waits.
    """
    tiles = -(-problem.space[1] // TILE)

    def columns(cut: Cut) -> int:
        return cut.strips * plan(problem, cut, device).box_columns

    for slots in SLOTS:
        cuts = [Cut(strips, slots) for strips in range(1, tiles + 1)]
        fitting = [cut for cut in cuts if plan(problem, cut, device).shared_bytes <= device.shared_memory]
        if fitting:
            return min(fitting, key=columns)
    return None


def plan(problem: Problem, cut: Cut, device: DeviceProperties) -> Plan:
    rows, columns = problem.space
    window_rows, window_columns = problem.window
    tiles, steps = -(-columns // TILE), -(-rows // TILE)
    strip_tiles = -(-tiles // cut.strips)
    box_columns = strip_tiles * TILE + window_columns - 1
    walks = problem.batch * cut.strips
    source = KernelSource(
        header="src/hopper_strip_backward.cuh",
        function="hopper_strip_backward",
        config=instantiate(
            "HopperStripBackwardConfig",
            problem.dtype,
            window_rows,
            window_columns,
            strip_tiles,
            cut.slots,
        ),
        arguments="HopperStripBackwardArguments",
        threads=THREADS,
    )
    # HopperStripBackwardShared: row blocks, the output of one, statistics, the mask, barriers.
    tokens, token_bytes = box_columns * TILE, problem.head_dim * 2
    used = cut.slots * tokens * (4 * token_bytes + 8) + tokens * token_bytes
    used += 2 * PADDING + window_columns * (4 * window_rows - 1) * (2 * window_columns + 1) * 8
    used += 8 + 3 * 8 * cut.slots
    # Behind: what is known of tiles, steps and columns.
    shared_bytes = -(-used // 16) * 16 + 128 * tiles + 256 * steps + 4 * (columns + window_columns - 1)
    return Plan(
        source=source,
        grid=problem.heads * max(1, min(walks, device.multiprocessors // problem.heads)),
        shared_bytes=shared_bytes,
        walks=walks,
        steps=steps,
        tiles=tiles,
        box_columns=box_columns,
    )


def representative_sources() -> Iterable[KernelSource]:
    """Sliding layers like those of the published models, wider and without a bias."""
    for problem in (
        *(nat_layer(length, torch.bfloat16, head_dim=64, rpb=False) for length in (56, 28)),
        nat_layer(28, torch.float16, head_dim=64, rpb=False),
        *(nat_layer(28, torch.bfloat16, head_dim=64, window=window, rpb=False) for window in (5, 3)),
    ):
        cut = choose_cut(problem, HOPPER)
        assert cut is not None
        yield plan(problem, cut, HOPPER).source
