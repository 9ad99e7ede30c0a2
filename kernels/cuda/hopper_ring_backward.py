"""`hopper_ring`: small sliding 2-D windows on sm_90a, backward: tensor copies, and the products of `strip`.

One kernel computes all gradients in one pass over the operands, without atomics: src/hopper_ring_backward.cuh. Blocks
stay on their SM and walk down strips of maps, each of one head. The bias gradient comes as one part per block, summed
afterwards in a fixed order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

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
from kernels.cuda.strip_walks import SIDE, WALKS, walks_of, why_no_rows, why_no_shape
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
    lift=INT,
    scale_log2=FLOAT,
)
_set_pointers = HOPPER_RING_BACKWARD.pointers()

ARCHITECTURES = ("sm_90a",)
LEAST_SLOTS, MOST_SLOTS = 3, 8
"""Row blocks that a ring holds: two are in use, another one comes in."""
WARPS = {32: 12, 64: 8}
"""That multiply, by head_dim: the fastest measured of the 8, 12 or 16 that the kernel takes."""
BIAS_LINES_BEFORE = 8
SWEEPS_BYTES, STEP_BYTES = 4 * 48, 80
"""Tables of a pair of columns, and of a step: StripSweep in two phases of up to two, RingStep."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Columns of a strip, and of its row blocks; row blocks in the ring; warps that multiply."""

    columns: int
    block_columns: int
    slots: int
    warps: int


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`'s backward pass, in one sentence; None if it does."""
    reason = why_no_shape(problem) or why_no_rows(problem)
    if reason:
        return reason
    if problem.head_dim > 32 and not problem.has_rpb:
        return "without a bias others are faster with a head_dim of 64"
    if lift_of(problem.axes[0]) is None:
        return f"no row blocks suit {problem.space[0]} rows with windows of {problem.window[0]}"
    device = runtime.properties(problem.device)
    strip = choose_strip(problem, problem.has_rpb, device)
    if strip is None:
        return f"its rings need more than the {device.shared_memory} bytes of a block"
    return walks_of(problem, strip.columns, 1, device).why_idle(device)


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
    strip = choose_strip(problem, problem.has_rpb, device)
    lift = lift_of(problem.axes[0])
    assert strip is not None, "why_not accepts the problem"
    assert lift is not None, "why_not accepts the problem"
    walks = walks_of(problem, strip.columns, 1, device)
    packed = HOPPER_RING_BACKWARD.pack(
        geometry=pack_geometry(problem),
        walks=walks.pack(_steps(problem.space[0], lift)),
        lift=lift,
        scale_log2=problem.scale * math.log2(math.e),
    )
    source, used = source_of(problem, strip, needs_rpb_grad), shared_bytes(problem, strip, needs_rpb_grad)
    start = Launch(source, walks.grid, used, packed, _set_pointers).bind(problem.device)
    tensors = (operands.query, operands.key, operands.value, grad_output)
    query, key, value, grad = (map_row_blocks(problem, tensor, strip.block_columns) for tensor in tensors)

    def launch(query_at: int, key_at: int, value_at: int, output_at: int, grad_at: int, *addresses: int) -> None:
        start(query(query_at), key(key_at), value(value_at), grad(grad_at), output_at, *addresses)

    return bound.backward(problem, launch, walks.blocks if needs_rpb_grad else 0)


def _steps(length: int, lift: int) -> int:
    return -(-(length + lift) // SIDE)


@functools.cache
def lift_of(axis: Axis) -> int | None:
    """By how many rows steps begin before the map, so that two row blocks hold all that a step's rows see or are seen
    from; None where nothing helps."""
    length, reach = axis.length, axis.window // 2

    def covers(lift: int) -> bool:
        for step in range(_steps(length, lift)):
            own = step * SIDE - lift
            for row in range(max(own, 0), min(own + SIDE, length)):
                for begin, end in (axis.window_at(row, length), axis.queries_at(row, length)):
                    if begin < own - reach or end > own - reach + 2 * SIDE:
                        return False
        return True

    return next((lift for lift in range(SIDE) if covers(lift)), None)


def _block_columns(axis: Axis, columns: int) -> int:
    """Of row blocks: all that the columns of any strip see or are seen from; odd."""
    length, most = axis.length, SIDE
    for begin in range(0, length, columns):
        reach = [
            see(c, length)
            for c in range(begin, min(begin + columns, length))
            for see in (axis.window_at, axis.queries_at)
        ]
        most = max(most, max(end for _, end in reach) - min(first for first, _ in reach))
    return most | 1


@functools.lru_cache(maxsize=1024)
def choose_strip(problem: Problem, needs_rpb_grad: bool, device: DeviceProperties) -> Strip | None:
    """The fewest strips of which shared memory holds enough row blocks."""
    axis = problem.axes[1]
    for strips in range(1, -(-axis.length // SIDE) + 1):
        columns = -(-axis.length // (2 * strips)) * 2
        block_columns = _block_columns(axis, columns)
        for slots in range(MOST_SLOTS, LEAST_SLOTS - 1, -1):
            strip = Strip(columns, block_columns, slots, WARPS[problem.head_dim])
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
    tables = SWEEPS_BYTES * -(-columns // 2) + STEP_BYTES * _steps(rows, SIDE - 1)
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
    """The sliding layers of the published models (kernel size 7, with bias) and the neighbouring cases; sm_90a only."""

    def source(problem: Problem, needs_rpb_grad: bool = True) -> KernelSource:
        strip = choose_strip(problem, problem.has_rpb, HOPPER)
        assert strip is not None, "its rings fit"
        return source_of(problem, strip, problem.has_rpb and needs_rpb_grad)

    for length in (56, 28, 14):
        yield source(nat_layer(length, torch.bfloat16))
    yield source(nat_layer(28, torch.float16))
    yield source(nat_layer(14, torch.bfloat16, head_dim=64))
    yield source(nat_layer(56, torch.bfloat16, rpb=False))
    yield source(nat_layer(28, torch.bfloat16), needs_rpb_grad=False)
    yield source(nat_layer(28, torch.bfloat16, window=5))
    yield source(nat_layer(28, torch.bfloat16, window=3))
