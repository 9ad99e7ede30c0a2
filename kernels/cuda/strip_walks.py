"""What `hopper_strip` and `hopper_ring` share: the maps that suit row blocks, and the walks that blocks are dealt.

A walk goes down one strip of a map of one head (or of a few maps side by side), a row block of 8 rows a step. Blocks
stay on their SM, each with one head, and take walk after walk; see include/fastna/hopper_strip.cuh.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from kernels.cuda import runtime
from kernels.cuda.arguments import INT, MAP_LIMIT, Struct
from kernels.cuda.hopper_tiles import SMALLEST_WINDOW
from kernels.cuda.runtime import DeviceProperties
from kernels.cuda.strip import DTYPES, HEAD_DIMS, SMALLEST_SCALE
from kernels.cuda.tensor_map import MAX_STEP
from kernels.problem import Axis, Problem

WALKS = Struct("StripWalks", "fastna/hopper_strip.cuh", entries=INT, at_once=INT, strips=INT, steps=INT)
WINDOWS = (3, 5, 7, 9, 11, 13)
SIDE = 8
"""Rows of a row block."""
LEAST_SHARE, LEAST_SHARE_BEFORE_FLASH = 0.75, 0.3
"""Of the time, that SMs must be busy: below, blocks that do not stay win. With windows of more than 8 rows or columns
and too few keys for `hopper` only `flash` is left, three times as slow."""


@dataclass(frozen=True, slots=True)
class Walks:
    """Of one head: strips of a map, batch entries (or groups side by side), and the blocks that share their walks."""

    heads: int
    strips: int
    entries: int
    blocks: int

    @property
    def grid(self) -> int:
        return self.heads * self.blocks

    @property
    def rounds(self) -> int:
        """The most walks of a block."""
        return -(-self.strips * self.entries // self.blocks)

    def pack(self, steps: int) -> bytes:
        return WALKS.pack(entries=self.entries, at_once=self.blocks // self.strips, strips=self.strips, steps=steps)

    def why_idle(self, problem: Problem, device: DeviceProperties) -> str | None:
        """Why there are too few for a device, in one sentence; None where there are not."""
        alone = max(problem.window) > SIDE and problem.window_size < SMALLEST_WINDOW
        least_share = LEAST_SHARE_BEFORE_FLASH if alone else LEAST_SHARE
        count = self.strips * self.entries
        if self.heads * count < least_share * self.rounds * device.multiprocessors:
            walks = f"{self.heads * count} walks down a map keep {device.multiprocessors} SMs"
            return f"{walks} busy for less than {least_share} of {self.rounds} rounds"
        return None


def walks_of(problem: Problem, columns: int, maps: int, device: DeviceProperties) -> Walks:
    """Of strips of `columns` columns and of `maps` maps side by side.

    Blocks are as many for every head as there are SMs, and at once all strips of a map.
    """
    strips, entries = -(-problem.space[1] // columns), -(-problem.batch // maps)
    at_once = max(device.multiprocessors // (problem.heads * strips), 1)
    return Walks(problem.heads, strips, entries, min(at_once * strips, entries * strips))


def why_no_shape(problem: Problem) -> str | None:
    """Why row blocks and walks do not suit a problem, forward or backward, in one sentence; None where they do."""
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
    if any(axis.causal or axis.stride != 1 for axis in problem.axes):
        return "it knows no causal masking and no stride"
    if max(problem.dilation) > MAX_STEP:
        return f"it takes dilations up to {MAX_STEP}, not {problem.dilation}"
    if any(window not in WINDOWS for window in problem.window):
        return f"it takes windows of {WINDOWS}, not {problem.window}"
    if problem.additional:
        return "it knows no additional keys"
    if problem.batch * problem.tokens * problem.heads >= MAP_LIMIT:
        return f"it counts fewer than {MAP_LIMIT} tokens and heads"
    if not SMALLEST_SCALE <= problem.scale < float("inf"):
        return f"it needs a finite scale of at least {SMALLEST_SCALE}, not {problem.scale}"
    return None


def group_lengths(axis: Axis) -> tuple[int, int]:
    """Of the longest and the shortest of its dilation groups, which differ by one at most."""
    return axis.group_length(0), axis.group_length(axis.dilation - 1)


def as_maps(problem: Problem) -> Problem:
    """Its dilation groups, as long as the longest, as maps of their own: entries of a batch. Axes keep
    their dilation.
    """
    axes = tuple(dataclasses.replace(axis, length=axis.group_length(0)) for axis in problem.axes)
    return dataclasses.replace(problem, batch=problem.batch * math.prod(problem.dilation), axes=axes)
