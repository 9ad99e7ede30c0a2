"""`hopper_ring`: small sliding 2-D windows on sm_90a, backward: tensor copies, and the products of `strip`.

One kernel computes all gradients in one pass over the operands, without atomics: src/hopper_ring_backward.cuh. Blocks
stay on their SM and walk down strips of maps, each of one head. The bias gradient comes as one part per block, summed
afterwards in a fixed order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import BoundBackward, Operands
from kernels.cuda import bound, runtime
from kernels.cuda.arguments import FLOAT, GEOMETRY, INT, POINTER, Struct, pack_geometry
from kernels.cuda.bound import Launch
from kernels.cuda.dry import HOPPER
from kernels.cuda.hopper_launch import TENSOR_MAP, map_row_blocks
from kernels.cuda.hopper_tiles import why_not_tensor
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.nat_layers import nat_layer
from kernels.cuda.runtime import DeviceProperties
from kernels.cuda.strip_walks import SIDE, WALKS, Walks, as_maps, walks_of, why_no_shape
from kernels.cuda.tensor_map import MAX_BOX, MAX_STEP
from kernels.problem import Axis, Problem

HOPPER_RING_BACKWARD = Struct(
    "HopperRingBackwardArguments",
    "fastna/hopper_ring_backward.cuh",
    query=TENSOR_MAP,
    key=TENSOR_MAP,
    value=TENSOR_MAP,
    grad_output=TENSOR_MAP,
    output=POINTER,
    grad_query=POINTER,
    grad_key=POINTER,
    grad_value=POINTER,
    lse=POINTER,
    grad_lse=POINTER,
    rpb=POINTER,
    grad_rpb=POINTER,
    geometry=GEOMETRY,
    walks=WALKS,
    turn=INT,
    carry=INT,
    lift=INT,
    spread=INT,
    scale_log2=FLOAT,
)
_set_pointers = HOPPER_RING_BACKWARD.pointers()

ARCHITECTURES = ("sm_90a",)
MOST_SLOTS = 8
"""Row blocks that a ring holds; at least one more than are in use."""
WARPS, FEWEST_WARPS = {32: 12, 64: 8}, 8
"""That multiply, by head_dim: the fastest measured of the 8, 12 or 16 that the kernel takes; 8 where no more fit."""
BIAS_LINES_BEFORE = 8
SWEEP_BYTES, STEP_BYTES = 48, 80
"""Tables of a sweep of a pair of columns, and of a step: StripSweep, RingStep."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Columns of a strip, and of its row blocks; row blocks in the ring; warps that multiply."""

    columns: int
    block_columns: int
    slots: int
    warps: int


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`'s backward pass, in one sentence; None if it does."""
    reason = why_no_shape(problem)
    if reason:
        return reason
    if any(axis.length % axis.dilation for axis in problem.axes):
        return f"it takes dilations up to {MAX_STEP} that divide an axis, not {problem.dilation} of {problem.space}"
    problem = as_maps(problem)
    if problem.head_dim > 32 and not problem.has_rpb:
        return "without a bias others are faster with a head_dim of 64"
    if lift_of(problem.axes[0]) is None:
        return f"no row blocks suit {problem.space[0]} rows with windows of {problem.window[0]}"
    device = runtime.properties(problem.device)
    strip = choose_strip(problem, problem.has_rpb, device)
    if strip is None:
        return f"its rings need more than the {device.shared_memory} bytes of a block"
    return _walks(problem, strip, device).why_idle(problem, device)


def why_not_gradient(operands: Operands, grad_output: Tensor) -> str | None:
    """Why tensor copies cannot read these tensors, in a few words; None where they can."""
    tensors = {"query": operands.query, "key": operands.key, "value": operands.value, "grad_output": grad_output}
    return next((reason for name, tensor in tensors.items() if (reason := why_not_tensor(name, tensor))), None)


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
    device = runtime.properties(problem.device)
    maps = as_maps(problem)
    strip = choose_strip(maps, problem.has_rpb, device)
    lift = lift_of(maps.axes[0])
    assert strip is not None, "why_not accepts the problem"
    assert lift is not None, "why_not accepts the problem"
    walks = _walks(maps, strip, device)
    uneven = walks.blocks % walks.strips
    source, used = source_of(maps, strip, needs_rpb_grad), shared_bytes(maps, strip, needs_rpb_grad)
    tensors = (operands.query, operands.key, operands.value, grad_output)
    query, key, value, grad = (map_row_blocks(problem, tensor, strip.block_columns) for tensor in tensors)

    def launch_of(spread: int) -> Callable[..., None]:
        packed = HOPPER_RING_BACKWARD.pack(
            geometry=pack_geometry(maps),
            walks=walks.pack(_steps(maps.space[0], lift)),
            turn=uneven or 1,
            carry=min(uneven, 1),
            lift=lift,
            spread=spread,
            scale_log2=problem.scale * math.log2(math.e),
        )
        start = Launch(source, walks.grid, used, packed, _set_pointers).bind(problem.device)

        def launch(query_at: int, key_at: int, value_at: int, output_at: int, grad_at: int, *addresses: int) -> None:
            start(query(query_at), key(key_at), value(value_at), grad(grad_at), output_at, *addresses)

        return launch

    return bound.backward(problem, launch_of(1), walks.blocks if needs_rpb_grad else 0, lambda: launch_of(3))


def _walks(maps: Problem, strip: Strip, device: DeviceProperties) -> Walks:
    """A head's blocks take all strips of some maps at once, or, where that leaves SMs idle for longer, any strips."""
    walks = walks_of(maps, strip.columns, 1, device)
    blocks = max(device.multiprocessors // maps.heads, 1)
    others = replace(walks, blocks=min(blocks, walks.strips * walks.entries))
    return min(walks, others, key=lambda walks: walks.rounds * -(-walks.grid // device.multiprocessors))


def _steps(length: int, lift: int) -> int:
    return -(-(length + lift) // SIDE)


def _row_blocks(window: int) -> tuple[int, int]:
    """Row blocks that a step has in reach, and the rows of them before its own: HopperRingBackwardConfig's."""
    return (2, window // 2) if window <= 7 else (3, SIDE)


def _sweeps(window: int) -> int:
    """Of 8 columns, for all that a pair of them sees, and for all that see it: HopperRingBackwardConfig's."""
    most = max(-(-2 * window // SIDE), 2)
    return most + (most if window <= 7 else -(-(window + 1) // SIDE))


@functools.cache
def lift_of(axis: Axis) -> int | None:
    """By how many rows steps begin before the map: row blocks then hold all that a step's rows see or are seen from,
    and the fewest are multiplied in vain. None where nothing helps."""
    lifts = [(*work, lift) for lift in range(SIDE) if (work := _work(axis, lift))]
    return min(lifts)[-1] if lifts else None


def _work(axis: Axis, lift: int) -> tuple[int, int] | None:
    """Steps, and the pairs of rows of their sweeps; None where some rows lie outside the row blocks in reach."""
    length, pairs = axis.length, 0
    blocks, above = _row_blocks(axis.window)
    for step in range(_steps(length, lift)):
        first = step * SIDE - lift - above
        rows = range(max(first + above, 0), min(first + above + SIDE, length))
        for see in (axis.window_at, axis.queries_at):
            begin, end = min(see(row, length)[0] for row in rows), max(see(row, length)[1] for row in rows)
            if begin < first or end > first + blocks * SIDE:
                return None
            pairs += -(-(end - first) // 2) - (begin - first) // 2
    return _steps(length, lift), pairs


@functools.cache
def _block_columns(axis: Axis, columns: int) -> int:
    """Of row blocks: all that the columns of any strip see or are seen from; odd."""
    length, most, inner = axis.length, SIDE, False
    for begin in range(0, length, columns):
        if axis.window <= begin <= length - axis.window - columns:  # strips away from the borders are all alike
            if inner:
                continue
            inner = True
        reach = [
            see(c, length)
            for c in range(begin, min(begin + columns, length))
            for see in (axis.window_at, axis.queries_at)
        ]
        most = max(most, max(end for _, end in reach) - min(first for first, _ in reach))
    return most | 1


@functools.lru_cache(maxsize=1024)
def choose_strip(problem: Problem, needs_rpb_grad: bool, device: DeviceProperties) -> Strip | None:
    """The fewest strips of which shared memory holds two row blocks more than a step needs, or else one more.

    With one ahead, warps wait for copies over a quarter of the time.
    """
    axis, needed = problem.axes[1], _row_blocks(problem.axes[0].window)[0]
    most_warps = WARPS[problem.head_dim]
    for warps, ahead in ((most_warps, 2), (most_warps, 1), (FEWEST_WARPS, 1)):
        for strips in range(1, -(-axis.length // SIDE) + 1):
            columns = -(-axis.length // (2 * strips)) * 2
            block_columns = _block_columns(axis, columns)
            if (block_columns - 1) * axis.dilation >= MAX_BOX:
                continue
            for slots in range(MOST_SLOTS, needed + ahead - 1, -1):
                strip = Strip(columns, block_columns, slots, warps)
                if shared_bytes(problem, strip, needs_rpb_grad) <= device.shared_memory:
                    return strip
    return None


def shared_bytes(problem: Problem, strip: Strip, needs_rpb_grad: bool) -> int:
    """sizeof HopperRingBackward::Shared, and the tables behind it."""
    (rows, columns), (window_rows, window_columns) = problem.space, problem.window
    lines, offsets = 2 * window_rows - 1, 2 * window_columns - 1
    tokens = strip.slots * SIDE * strip.block_columns
    bias = (lines + 2 * BIAS_LINES_BEFORE) * (2 * window_columns + 1) if problem.has_rpb else 1
    sums = -(-strip.warps * lines * offsets // 4) * 4 if needs_rpb_grad else 4
    used = tokens * (8 * problem.head_dim + 16) + 16 * bias + 4 * sums + 3 * 8 * strip.slots
    sweeps = -(-columns // 2) * _sweeps(window_columns)
    tables = SWEEP_BYTES * sweeps + STEP_BYTES * _steps(rows, SIDE - 1)
    return -(-used // 16) * 16 + tables


def source_of(problem: Problem, strip: Strip, needs_rpb_grad: bool) -> KernelSource:
    config = instantiate(
        "HopperRingBackwardConfig",
        problem.dtype,
        problem.rpb_dtype or torch.float32,
        problem.has_rpb,
        needs_rpb_grad,
        problem.head_dim,
        *problem.window,
        strip.columns,
        strip.block_columns,
        strip.slots,
        strip.warps,
        max(problem.dilation) > 1,
    )
    return KernelSource(
        header="src/hopper_ring_backward.cuh",
        function="hopper_ring_backward",
        config=config,
        arguments="HopperRingBackwardArguments",
        threads=32 * (4 + strip.warps),
        shared_bytes=shared_bytes(problem, strip, needs_rpb_grad),
    )


def representative_sources() -> Iterable[KernelSource]:
    """The sliding layers of the published models (kernel sizes 7 and 11, with bias) and the neighbouring cases."""

    def source(problem: Problem, needs_rpb_grad: bool = True) -> KernelSource:
        maps = as_maps(problem)
        strip = choose_strip(maps, problem.has_rpb, HOPPER)
        assert strip is not None, "its rings fit"
        return source_of(maps, strip, problem.has_rpb and needs_rpb_grad)

    for length in (56, 28, 14):
        yield source(nat_layer(length, torch.bfloat16))
    for length in (56, 28, 14, 12):
        yield source(nat_layer(length, torch.bfloat16, window=11))
    yield source(replace(nat_layer(12, torch.bfloat16, window=11), axes=(Axis(96, 11, 8),) * 2))
    yield source(nat_layer(28, torch.float16))
    yield source(nat_layer(14, torch.bfloat16, head_dim=64))
    yield source(nat_layer(56, torch.bfloat16, rpb=False))
    yield source(nat_layer(28, torch.bfloat16), needs_rpb_grad=False)
    yield source(nat_layer(28, torch.bfloat16, window=5))
    yield source(nat_layer(28, torch.bfloat16, window=3))
