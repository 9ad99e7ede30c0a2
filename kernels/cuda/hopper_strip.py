"""`hopper_strip`: small sliding 2-D windows on sm_90a, forward, by tensor copies; see src/hopper_strip_forward.cuh.

Blocks stay on their SM and walk down strips of maps, each of one head. So this family is for many maps; `strip` serves
the others, and all that row blocks of 8 rows do not suit, with windows up to 7, `flash` with wider ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import BoundForward, Operands
from kernels.cuda import bound, runtime, tuning
from kernels.cuda.arguments import FLOAT, GEOMETRY, POINTER, Struct, address, pack_geometry
from kernels.cuda.bound import Launch
from kernels.cuda.dry import HOPPER
from kernels.cuda.hopper_launch import TENSOR_MAP, bind, map_row_blocks
from kernels.cuda.hopper_tiles import why_not_tensor
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.nat_layers import nat_layer
from kernels.cuda.runtime import DeviceProperties
from kernels.cuda.strip_walks import SIDE, WALKS, as_maps, group_lengths, walks_of, why_no_shape
from kernels.cuda.tensor_map import MAX_BOX
from kernels.problem import Axis, Problem

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
LOG2_E = math.log2(math.e)
MOST_COLUMNS = {32: 32, 64: 16}
"""Of a strip, by head_dim: with more of them shared memory holds too few row blocks ahead of the one in use."""
WARPS = 15  # that multiply; with the one that copies four on each quarter of an SM, of 128 registers
OTHER_WARPS = {32: 19, 64: 11}  # by head_dim: five of 96 registers, three of 168
WIDE_WARPS = (11, 7)  # for windows of more than 7 rows or columns: of 168 registers, or of 255
MOST_HELD = 90  # numbers that a lane of 168 registers has room for without spills


@dataclass(frozen=True, slots=True)
class Strip:
    """Columns of a strip, and maps side by side where a map is one; row blocks and steps of queries in rings; warps."""

    columns: int
    maps: int
    stages: int
    query_stages: int
    warps: int

    @property
    def threads(self) -> int:
        """One warp copies, the others multiply."""
        return 32 * (1 + self.warps)


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve the forward pass, in one sentence; None where it does."""
    reason = why_no_shape(problem) or why_no_rows(problem)
    if reason:
        return reason
    if max(problem.dilation) > 1 and max(problem.window) < SIDE and as_maps(problem).space[1] <= SIDE:
        return f"on dilation groups of at most {SIDE} columns `strip` is as fast or faster"
    device = runtime.properties(problem.device)
    strip = choose_strip(problem, device)
    if strip is None:
        return "a strip would be too narrow, or its rings too large for shared memory"
    return walks_of(as_maps(problem), strip.columns, strip.maps, device).why_idle(problem, device)


def why_no_rows(problem: Problem) -> str | None:
    """Why a step's row blocks do not hold what 8 rows of queries see, in one sentence; None where they do."""
    if is_whole(problem.axes[0]):
        return None
    refused = (n for n in group_lengths(problem.axes[0]) if not suits(n, problem.window[0]))
    return next(
        (f"the last {n % SIDE} of {n} rows have windows that begin before their row block" for n in refused), None
    )


def suits(length: int, window: int) -> bool:
    """Whether the windows of every 8 rows of queries lie within their two row blocks, which begin window // 2 rows
    before them; or three, those of the map around them, where windows have more than 8 rows."""
    return length % SIDE == 0 or length % SIDE > (window // 2 if window < SIDE else window - SIDE - 1)


def is_whole(axis: Axis) -> bool:
    """Whether two row blocks are the rows of every map, and every query sees some of the first one."""
    return all(axis.window < SIDE < length < SIDE + axis.window for length in group_lengths(axis))


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why tensor copies cannot read these tensors, in a few words; None where they can."""
    for name in ("query", "key", "value"):
        if reason := why_not_tensor(name, getattr(operands, name)):
            return reason
    return None


def choose_strip(problem: Problem, device: DeviceProperties) -> Strip | None:
    """Strips of equal width, at most `MOST_COLUMNS`, and as many row blocks in shared memory as it holds.

    Of wide windows the fewest strips that leave room for two steps of queries: their tables and row blocks are large.
    """
    axis, wide = problem.axes[1], max(problem.window) > SIDE
    needed = 3 if problem.window[0] > SIDE else 2  # row blocks of a step
    lengths = group_lengths(axis)
    fewest = -(-max(lengths) // MOST_COLUMNS[problem.head_dim])
    for strips in range(fewest, max(-(-max(lengths) // SIDE), fewest) + 1 if wide else fewest + 1):
        columns = -(-max(lengths) // (2 * strips)) * 2
        if any(0 < n % columns <= axis.window // 2 for n in lengths) or columns < axis.window // 2 + 2:
            continue  # some windows would begin before their strip's row blocks, or end behind them
        if (columns + axis.window - 2) * axis.dilation >= MAX_BOX:
            continue
        maps = 1 if strips > 1 or wide or max(problem.dilation) > 1 else MOST_COLUMNS[problem.head_dim] // columns
        if problem.batch * problem.heads < 2 * maps * device.multiprocessors:
            maps = 1
        # A lane holds scores and weights of all columns of keys, and sums of values.
        roomy = 6 * (axis.window + 1) + problem.head_dim // 2 > MOST_HELD
        warps = WIDE_WARPS[int(roomy)] if wide else WARPS
        # The copying warp waits for queries' place with one row block more.
        for query_stages in range(7, 1 if wide else 0, -1):
            strip = Strip(columns, maps, query_stages + needed - 1, query_stages, warps)
            if shared_bytes(problem, strip) <= device.shared_memory:
                return strip
    return None


def shared_bytes(problem: Problem, strip: Strip) -> int:
    """sizeof HopperStripForward::Shared."""
    column = SIDE * problem.head_dim * 2
    rows, columns = problem.window
    block = strip.maps * (strip.columns + columns - 1) * column
    entries = 3 * SIDE - 2 + (SIDE if rows > SIDE or is_whole(problem.axes[0]) else 0)
    steps = (4 if rows > SIDE else 3) * (2 if max(problem.dilation) > 1 else 1)
    lines = 2 * columns if problem.has_rpb or rows < SIDE else 2
    bias = rows * lines * entries * 8 + steps * 32 * 4
    barriers = 8 * 2 * (strip.stages + strip.query_stages)
    return 2 * strip.stages * block + strip.query_stages * strip.maps * strip.columns * column + bias + barriers


def source_of(problem: Problem, strip: Strip) -> KernelSource:
    config = instantiate(
        "HopperStripForwardConfig",
        problem.dtype,
        problem.rpb_dtype or torch.float32,
        problem.has_rpb,
        problem.head_dim,
        *problem.window,
        is_whole(problem.axes[0]),
        strip.columns,
        strip.maps,
        strip.warps,
        strip.stages,
        strip.query_stages,
        max(problem.dilation) > 1,
    )
    return KernelSource(
        header="src/hopper_strip_forward.cuh",
        function="hopper_strip_forward",
        config=config,
        arguments="HopperStripForwardArguments",
        threads=strip.threads,
        shared_bytes=shared_bytes(problem, strip),
    )


def candidate_strips(problem: Problem, device: DeviceProperties) -> list[Strip]:
    """What `choose_strip` takes; then more warps of fewer registers, or at head_dim 64 fewer of more; of wide windows
    the other number of warps.
    """
    guess = choose_strip(problem, device)
    assert guess is not None, "why_not accepts the problem"
    wide = max(problem.window) > SIDE
    other = sum(WIDE_WARPS) - guess.warps if wide else OTHER_WARPS[problem.head_dim]
    return [guess, replace(guess, warps=other)]


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """Of problems and tensors that `why_not` and `why_not_operands` accept. See kernels.backend.bind_forward."""
    device = runtime.properties(problem.device)
    groups = as_maps(problem)

    def launch_of(strip: Strip) -> Callable[..., None]:
        walks = walks_of(groups, strip.columns, strip.maps, device)
        packed = HOPPER_STRIP_FORWARD.pack(
            geometry=pack_geometry(problem),
            walks=walks.pack(-(-groups.space[0] // SIDE)),
            inverse_scale=1.0 / problem.scale,
            scale_log2e=problem.scale * LOG2_E,
        )
        launch = Launch(source_of(problem, strip), walks.grid, shared_bytes(problem, strip), packed, _set_pointers)
        halo = problem.window[1] - 1
        columns = (strip.columns, strip.columns + halo, strip.columns + halo)
        tensors = (operands.query, operands.key, operands.value)
        maps = [
            map_row_blocks(problem, tensor, width, strip.maps, column_by_column=True)
            for tensor, width in zip(tensors, columns, strict=True)
        ]
        return bind(launch, problem, maps)

    @functools.cache
    def tried() -> tuple[Tensor | None, ...]:
        """What candidates read and write: one set of results for all, for memory may be short."""
        rpb = None if operands.rpb is None else operands.rpb.contiguous()
        results = (new_result() for new_result in bound.new_results(problem))
        return operands.query, operands.key, operands.value, *results, rpb

    def start(strip: Strip) -> Callable[[], object]:
        launch = launch_of(strip)
        return lambda: launch(*map(address, tried()))

    candidates = candidate_strips(problem, device)
    strip = tuning.choose(_tuned_as(groups), candidates, problem.device, lambda strip: source_of(problem, strip), start)
    return bound.forward(problem, launch_of(strip))


def _tuned_as(problem: Problem) -> str:
    """What the best strip depends on, sizes of the batch to a factor of two."""
    (height, width), (rows, columns) = problem.space, problem.window
    bias = f"{problem.rpb_dtype} bias" if problem.has_rpb else "no bias"
    if max(problem.dilation) > 1:
        bias += ", dilation groups"
    return (
        f"hopper_strip_forward: {height} x {width}, window {rows} x {columns}, head_dim {problem.head_dim}, "
        f"{problem.dtype}, {bias}, 2^{round(math.log2(problem.batch * problem.heads))} maps"
    ).replace("torch.", "")


def representative_sources() -> Iterable[KernelSource]:
    """The sliding layers of the published models (kernel size 7, with bias) and the neighbouring cases; sm_90a only."""
    for problem in (
        *(nat_layer(length, torch.bfloat16) for length in (56, 28, 14)),
        nat_layer(28, torch.float16),
        nat_layer(14, torch.bfloat16, head_dim=64),
        nat_layer(56, torch.bfloat16, rpb=False),
        nat_layer(28, torch.bfloat16, window=5),
        nat_layer(28, torch.bfloat16, window=3),
        *(nat_layer(length, torch.bfloat16, window=11) for length in (56, 28, 14, 12)),
        nat_layer(56, torch.float16, window=9, rpb=False),
        nat_layer(56, torch.bfloat16, window=13),
        *(nat_layer(56, torch.bfloat16, head_dim=64, window=window) for window in (9, 11)),
        nat_layer(56, torch.bfloat16, head_dim=64, window=13, rpb=False),
        replace(nat_layer(12, torch.bfloat16, window=11), axes=(Axis(96, 11, 8),) * 2),
        replace(nat_layer(28, torch.bfloat16), axes=(Axis(56, 7, 2),) * 2),
        replace(nat_layer(12, torch.bfloat16, window=11), axes=(Axis(56, 11, 5),) * 2),
    ):
        strip = choose_strip(problem, HOPPER)
        assert strip is not None, "its rings fit"
        yield source_of(problem, strip)
