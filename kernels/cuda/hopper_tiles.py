"""What the Hopper kernels share on the host: which problems they take, and tile boxes.

Rows stay in a block (queries; keys for their own gradients), columns stream past them in boxes. Boxes are chosen per
problem by the one thing that decides here: how many (row, column) pairs they multiply in all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Operands
from kernels.cuda import runtime, tensor_map
from kernels.cuda.arguments import padded_axes
from kernels.cuda.jit import instantiate
from kernels.problem import Axis, Problem

ROWS = 64  # of one warpgroup
RESERVED = 1024  # bytes of shared memory that the system takes per block
STEP_PAIRS = 12  # what a box costs besides its pairs, in columns
SMALLEST_WINDOW = 128  # keys; below, tiles that are mostly masked cost more than the other families
_ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a warpgroup, warpgroups and columns of a box along each of three axes, and stages of columns."""

    rows: tuple[int, int, int]
    warpgroups: tuple[int, int, int]
    columns: tuple[int, int, int]
    stages: int
    resident: int = 1
    """Blocks that an SM holds at once."""

    @property
    def groups(self) -> int:
        return math.prod(self.warpgroups)

    @property
    def threads(self) -> int:
        """One warpgroup copies, the others multiply."""
        return 128 * (1 + self.groups)

    @property
    def registers(self) -> int:
        """Per thread that multiplies: the copying warpgroup keeps 24 per thread, the others share the rest."""
        share = 65536 // (self.threads * self.resident) // 8 * 8
        return min((share * (1 + self.groups) - 24) // self.groups // 8 * 8, 240)

    @property
    def block(self) -> tuple[int, ...]:
        """Rows of one block along each axis."""
        return tuple(r * w for r, w in zip(self.rows, self.warpgroups, strict=True))

    def counts(self, axes: tuple[Axis, ...]) -> list[int]:
        """Blocks along each axis of the longest dilation group."""
        return [-(-axis.group_length(0) // block) for axis, block in zip(axes, self.block, strict=True)]

    def rows_bytes(self, head_dim: int) -> int:
        """One vector of every row of a block."""
        return self.groups * ROWS * head_dim * _ELEMENT_BYTES

    def box_bytes(self, head_dim: int) -> int:
        """One vector of every column of a box."""
        return math.prod(self.columns) * head_dim * _ELEMENT_BYTES

    @property
    def windows_bytes(self) -> int:
        return self.groups * 3 * ROWS * 8

    def config(self, dtype: torch.dtype, head_dim: int, inverse: bool) -> str:
        return instantiate(
            "HopperTiles", dtype, head_dim, inverse, *self.rows, *self.warpgroups, *self.columns, self.stages
        )


def why_not(problem: Problem) -> str | None:
    """Why no Hopper kernel serves a problem, in one sentence; None where they do."""
    reason = runtime.why_not_here(problem)
    if reason:
        return reason
    if runtime.properties(problem.device).capability != (9, 0):
        return "it needs compute capability 9.0"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {problem.dtype}"
    if problem.head_dim != problem.value_dim or problem.head_dim % 16 or problem.head_dim > 256:
        return f"it takes one head_dim, a multiple of 16 up to 256, not {problem.head_dim} and {problem.value_dim}"
    if problem.rpb_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        return f"it takes a bias in float32, float16 or bfloat16, not {problem.rpb_dtype}"
    if problem.scale <= 0:
        return f"it takes a positive scale, not {problem.scale}"
    if problem.window_size < SMALLEST_WINDOW:
        return f"it is for windows of at least {SMALLEST_WINDOW} keys, not {problem.window_size}"
    if max(problem.dilation) > tensor_map.MAX_STEP:
        return f"it takes dilations up to {tensor_map.MAX_STEP}, not {problem.dilation}"
    return None


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias in shared memory, as hopper_bias.cuh wants it: tables of one head or of several that share keys."""

    dtype: torch.dtype
    windows: tuple[int, int, int]
    heads: int = 1

    @property
    def config(self) -> str:
        return instantiate("HopperBias", self.dtype, *self.windows, self.heads)

    def bytes(self, rows: tuple[int, int, int], columns: tuple[int, int, int]) -> int:
        """The tables, and the margins around them that pairs of a box read which no window joins."""
        entries, margin = 1, 0
        for window, row, column in zip(self.windows, rows, columns, strict=True):
            side = 2 * window - 1
            margin = margin * side + row + column - 2
            entries *= side
        return 4 * (self.heads * entries + 2 * margin)


def bias_of(problem: Problem, keys: bool = False) -> Bias | None:
    """What a kernel needs of a problem's bias; `keys`: its rows are keys."""
    if problem.rpb_dtype is None:
        return None
    first, second, third = (axis.window for axis in padded_axes(problem))
    return Bias(problem.rpb_dtype, (first, second, third), problem.heads // problem.key_heads if keys else 1)


@dataclass(frozen=True, slots=True)
class Room:
    """Shared memory that boxes of columns and a bias share: bytes in all, and bytes per column of a box."""

    bias: Bias
    shared: int
    per_column: int

    def holds(self, rows: tuple[int, int, int], columns: tuple[int, int, int]) -> bool:
        return self.bias.bytes(rows, columns) + self.per_column * math.prod(columns) <= self.shared


def _room_beside(
    bias: Bias, problem: Problem, groups: int, stages: int, resident: int, shared_bytes: Callable[[Tiles], int]
) -> Room:
    none, sixteen = (shared_bytes(Tiles((1, 1, ROWS), (1, 1, groups), (1, 1, size), stages)) for size in (0, 16))
    limit = (runtime.properties(problem.device).shared_memory + RESERVED) // resident - RESERVED
    return Room(bias, limit - none, (sixteen - none) // 16)


def tiles_of(
    problem: Problem,
    groups: int,
    most: int,
    stages: int,
    shared_bytes: Callable[[Tiles], int],
    resident: int = 1,
    inverse: bool = False,
    exact: bool = False,
) -> Tiles | None:
    """What `choose_tiles` says of a problem and its bias.

    `shared_bytes`: what a block of the kernel wants without a bias, for boxes of any size.
    """
    bias = bias_of(problem, inverse)
    room = None if bias is None else _room_beside(bias, problem, groups, stages, resident, shared_bytes)
    return choose_tiles(padded_axes(problem), groups, most, stages, resident, inverse, room, exact)


def why_no_tiles(problem: Problem) -> str:
    """Why `choose_tiles` finds none for a problem, as it does for all others."""
    if problem.has_rpb:
        return f"shared memory does not hold a bias of {problem.rpb_shape[1:]} beside the boxes of tokens"
    return f"no copy brings a box of tokens at a dilation of {problem.dilation}"


def why_not_tensor(name: str, tensor: Tensor) -> str | None:
    """Why tensor copies cannot read a tensor: alignment, or heads that do not lie within one token."""
    *outer, head, _ = tensor.stride()
    steps = [step for step, size in zip(outer, tensor.shape, strict=False) if size > 1]
    width = (tensor.shape[-2] - 1) * head + tensor.shape[-1]
    if tensor.data_ptr() % 16 or any(step * tensor.element_size() % 16 for step in (*steps, head)):
        return f"{name} is not aligned to 16 bytes"
    if (tensor.shape[-2] > 1 and head != tensor.shape[-1]) or any(step < width for step in steps):
        return f"{name} has heads that do not follow each other within a token"
    return None


def why_not_operands(operands: Operands) -> str | None:
    """Why tensor copies cannot read the operands, in a few words; None where they can."""
    for name in ("query", "key", "value", "additional_keys", "additional_values"):
        tensor = getattr(operands, name)
        if tensor is not None and (reason := why_not_tensor(name, tensor)):
            return reason
    return None


def _along(axis: Axis, rows: int, warpgroups: int, columns: int, inverse: bool) -> int:
    """Pairs that warpgroups multiply along one axis: each visits the boxes that meet its own windows.

    Boxes start where the union of the block's windows does, so a warpgroup behind the first may visit one more.
    """
    seen = axis.queries_at if inverse else axis.window_at
    total = 0
    for length in {axis.group_length(group) for group in range(axis.dilation)}:
        groups = sum(axis.group_length(group) == length for group in range(axis.dilation))
        for block in range(0, length, rows * warpgroups):
            start = seen(block, length)[0]
            for first in range(block, min(block + rows * warpgroups, length), rows):
                last = min(first + rows, length) - 1
                skipped = (seen(first, length)[0] - start) // columns
                boxes = -(-(seen(last, length)[1] - start) // columns) - skipped
                total += groups * boxes * columns * rows
    return total


def _boxes(count: int, exact: bool, axes: tuple[Axis, ...], multiple: int) -> Iterator[tuple[int, int, int]]:
    """Boxes of `count` (or at most so many) tokens, along the last axis a multiple of `multiple`."""
    flat = [axis.length == 1 for axis in axes]
    for first in range(1, 2 if flat[0] else min(count, 32) + 1):
        for second in range(1, 2 if flat[1] else count // first + 1):
            for third in range(multiple, count // (first * second) + 1, multiple):
                size = first * second * third
                if size == count if exact else size % 16 == 0 and 2 * size > count:
                    yield first, second, third


@functools.lru_cache(maxsize=512)
def choose_tiles(
    axes: tuple[Axis, ...],
    groups: int,
    most: int,
    stages: int = 2,
    resident: int = 1,
    inverse: bool = False,
    room: Room | None = None,
    exact: bool = False,
) -> Tiles | None:
    """The boxes of `groups` warpgroups and up to `most` columns that multiply the fewest pairs.

    `axes` are padded to three; `inverse`: rows are keys, and columns the queries that see them; `exact`: boxes have
    `most` columns. `room`, where there is a bias, is for it and the boxes. None where that or copies allow no boxes.
    """
    along = functools.cache(functools.partial(_along, inverse=inverse))
    all_rows = [
        box
        for box in _boxes(ROWS, True, axes, 1)
        if _one_copy(axes, box) and not any(side & (side - 1) for side in box)
    ]
    columns: list[tuple[int, int, int]] = []
    while not columns and most >= 16:  # a line of dilated tokens may allow no box of this size
        columns = [box for box in _boxes(most, exact, axes, 8) if _one_copy(axes, box)]
        most = 0 if exact else most // 2
    if not all_rows or not columns:
        return None
    best: tuple[float, Tiles] | None = None
    sides = range(1, groups + 1)
    arrangements = [(a, b, c) for a, b, c in itertools.product(sides, repeat=3) if a * b * c == groups]
    for rows, warpgroups in itertools.product(all_rows, arrangements):
        block = [r * w for r, w in zip(rows, warpgroups, strict=True)]
        if any(side > max(axis.length, 1) and w > 1 for side, axis, w in zip(block, axes, warpgroups, strict=True)):
            continue
        for box in columns:
            if room is not None and not room.holds(rows, box):
                continue
            shapes = zip(axes, rows, warpgroups, box, strict=True)
            cost = math.prod(along(*shape) for shape in shapes) * (1 + STEP_PAIRS / math.prod(box))
            if best is None or cost < best[0]:
                best = cost, Tiles(rows, warpgroups, box, stages, resident)
    if best is None and room is None:
        return Tiles(all_rows[0], (1, 1, groups), columns[-1], stages, resident)
    return None if best is None else best[1]


def _one_copy(axes: tuple[Axis, ...], box: tuple[int, int, int]) -> bool:
    """Whether one copy brings a box, whose tokens lie `dilation` apart."""
    return all((side - 1) * axis.dilation < tensor_map.MAX_BOX for side, axis in zip(box, axes, strict=True))
