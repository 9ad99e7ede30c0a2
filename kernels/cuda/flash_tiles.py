"""Which boxes of tokens the flash kernels make tiles of: those that multiply the fewest (query, key) pairs.

A tile of rows visits the tiles that cover the union of what its rows see, and multiplies every pair of them. Along each
axis that is a sum over the tiles of rows, and the whole is the product over the axes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels.problem import MAX_RANK, Axis

Box = tuple[int, int, int]

SAMPLED_TILES = 64
"""Tiles of rows along one axis that are looked at: those between are like their neighbours."""

NARROW_COLUMNS, WIDE_COLUMNS = 1.1, 1.02
"""A product takes 8 columns: as a run along the last axis, a lane masks that axis once per tile, else more often."""

TILE_OVERHEAD = 512
"""Time to start a tile of rows, in pairs per row: its loads and its stores."""


@dataclass(frozen=True, slots=True)
class Tiling:
    rows: Box
    columns: Box


def boxes(size: int, axes: Sequence[Axis]) -> Iterator[Box]:
    """Boxes of `size` (a power of two) tokens with powers of two for sides, of length 1 along missing leading axes."""
    sides = [1 << exponent for exponent in range(size.bit_length())]
    missing = MAX_RANK - len(axes)
    for box in itertools.product(*([[1]] * missing + [sides] * len(axes))):
        if math.prod(box) == size:
            yield box  # type: ignore[misc]


def seen_interval(axis: Axis, first: int, last: int, length: int, inverse: bool) -> tuple[int, int]:
    """What the positions `first` to `last` of a group see, or are seen by: both ends grow with the position."""
    seen = axis.queries_at if inverse else axis.window_at
    return seen(first, length)[0], seen(last, length)[1]


@functools.lru_cache(maxsize=4096)
def visits(axis: Axis, rows: int, columns: int, inverse: bool) -> float:
    """Tiles of columns visited along an axis by all tiles of rows of one dilation group."""
    length = axis.group_length(0)
    tiles = -(-length // rows)
    step = -(-tiles // SAMPLED_TILES)
    sampled = range(0, tiles, step)
    total = 0
    for tile in sampled:
        first = tile * rows
        begin, end = seen_interval(axis, first, min(first + rows, length) - 1, length, inverse)
        total += -(-(end - begin) // columns)
    return total * tiles / len(sampled)


@functools.lru_cache(maxsize=1024)
def choose_tiling(axes: tuple[Axis, ...], rows: int, columns: int, inverse: bool) -> Tiling:
    """The boxes of `rows` and `columns` tokens that take least time; always the same: gradients are summed by tile."""

    def cost(tiling: Tiling) -> float:
        sides = list(zip(axes, tiling.rows[-len(axes) :], tiling.columns[-len(axes) :], strict=True))
        pairs = math.prod(visits(axis, row, column, inverse) for axis, row, column in sides) * rows * columns
        run = tiling.columns[-1]
        mask = NARROW_COLUMNS if run < 8 else WIDE_COLUMNS if run > 8 else 1.0
        tiles = math.prod(-(-axis.group_length(0) // row) for axis, row, _ in sides)
        return pairs * mask + tiles * rows * TILE_OVERHEAD

    candidates = (Tiling(row, column) for row in boxes(rows, axes) for column in boxes(columns, axes))
    return min(candidates, key=cost)


def row_tiles(axes: Sequence[Axis], rows: Box) -> Box:
    """Tiles of rows along each of three axes, in the longest dilation group."""
    missing = MAX_RANK - len(axes)
    counts = [-(-axis.group_length(0) // side) for axis, side in zip(axes, rows[missing:], strict=True)]
    return tuple([1] * missing + counts)  # type: ignore[return-value]
