"""How `tiled` cuts a space: query tiles, the keys that their windows span, and which tiles are alike.

A tile is a run of consecutive positions of one dilation group per axis; its halo is the bounding box of its windows.
Tiles whose windows lie alike in their halos form a class. A class has constant steps from tile to tile and from group
to group, so all its query tiles are one strided view of the query and all its halos are one (overlapping) strided view
of the key: nothing is gathered by index, and one bias serves the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from kernels.problem import Axis, Problem

# Queries of a tile along one axis, by rank: as long as the window, within these bounds. Shorter tiles make small
# products, longer ones waste keys ((tile + window - 1) / window per axis are multiplied for each one used).
SHORTEST = {1: 16, 2: 4, 3: 3}
LONGEST = {1: 256, 2: 16, 3: 6}


@dataclass(frozen=True, slots=True)
class AxisClass:
    """Alike tiles along one axis. Positions are those of a dilation group; `windows` start at the halo's first key."""

    first_group: int
    groups: int
    tiles: int
    step: int
    query_start: int
    queries: int
    key_start: int
    keys: int
    windows: tuple[tuple[int, int], ...]

    @property
    def is_masked(self) -> bool:
        """Whether some query of the tile does not see some key of the halo."""
        return any(window != (0, self.keys) for window in self.windows)

    def key_pieces(self) -> list[tuple[int, int]]:
        """The halo cut into pieces [first, last) so short that the same piece of two tiles never overlaps."""
        length = self.keys if self.tiles == 1 else self.step
        return [(first, min(first + length, self.keys)) for first in range(0, self.keys, length)]


TileClass = tuple[AxisClass, ...]


@lru_cache(maxsize=1024)
def tile_classes(axes: tuple[Axis, ...]) -> tuple[TileClass, ...]:
    """All classes of tiles of a space; together their queries are every token once."""
    return tuple(product(*(_axis_classes(axis, len(axes)) for axis in axes)))


def _axis_classes(axis: Axis, rank: int) -> list[AxisClass]:
    longer = axis.length % axis.dilation
    kinds = [(0, longer), (longer, axis.dilation - longer)]
    return [found for first, count in kinds if count for found in _group_classes(axis, rank, first, count)]


def _group_classes(axis: Axis, rank: int, first_group: int, groups: int) -> list[AxisClass]:
    """Classes of `groups` dilation groups of one length, the first of them `first_group`."""
    length = axis.group_length(first_group)
    tile = _tile_length(axis, rank, length)
    alike: dict[tuple[int, int, tuple[tuple[int, int], ...]], list[int]] = {}
    for start in range(0, length, tile):
        windows = [axis.window_at(position, length) for position in range(start, min(start + tile, length))]
        key_start = min(window[0] for window in windows)
        keys = max(window[1] for window in windows) - key_start
        relative = tuple((first - key_start, end - key_start) for first, end in windows)
        alike.setdefault((start - key_start, keys, relative), []).append(start)
    classes = []
    for (ahead, keys, relative), starts in alike.items():
        for run in _arithmetic_runs(starts):
            step = run[1] - run[0] if len(run) > 1 else tile
            classes.append(
                AxisClass(first_group, groups, len(run), step, run[0], len(relative), run[0] - ahead, keys, relative)
            )
    return classes


def _tile_length(axis: Axis, rank: int, length: int) -> int:
    tile = min(length, LONGEST[rank], max(axis.window, SHORTEST[rank]))
    if axis.stride > 1:
        return max(tile // axis.stride * axis.stride, min(axis.stride, tile))
    count = -(-length // tile)
    return -(-length // count)


def _arithmetic_runs(starts: list[int]) -> list[list[int]]:
    """`starts` cut into runs of constant difference."""
    runs: list[list[int]] = []
    for start in starts:
        run = runs[-1] if runs else []
        if len(run) == 1 or (len(run) > 1 and start - run[-1] == run[1] - run[0]):
            run.append(start)
        else:
            runs.append([start])
    return runs


def tile_view(
    tensor: Tensor, problem: Problem, tiles: TileClass, keys: bool, pieces: tuple[tuple[int, int], ...] | None = None
) -> Tensor:
    """The queries, or the keys of the halos, of all tiles of a class: a view that copies nothing.

    `tensor` is `[batch, *space, ...rest]`; the view `[batch, groups_0, tiles_0, groups_1, tiles_1, ..., n_0, n_1, ...,
    *rest]`. `pieces` limits each halo to the keys [first, last) of each axis.
    """
    strides = tensor.stride()
    offset = tensor.storage_offset()
    outer_size, outer_stride, inner_size, inner_stride = [], [], [], []
    for i, (axis, tile) in enumerate(zip(problem.axes, tiles, strict=True)):
        token = strides[i + 1]
        position = token * axis.dilation
        start, count = (tile.key_start, tile.keys) if keys else (tile.query_start, tile.queries)
        if pieces is not None:
            start, count = start + pieces[i][0], pieces[i][1] - pieces[i][0]
        offset += tile.first_group * token + start * position
        outer_size += [tile.groups, tile.tiles]
        outer_stride += [token, tile.step * position]
        inner_size.append(count)
        inner_stride.append(position)
    rest = problem.rank + 1
    return tensor.as_strided(
        (tensor.shape[0], *outer_size, *inner_size, *tensor.shape[rest:]),
        (strides[0], *outer_stride, *inner_stride, *strides[rest:]),
        offset,
    )


@lru_cache(maxsize=1024)
def bias_index(axes: tuple[Axis, ...], tiles: TileClass, device: torch.device) -> Tensor:
    """Index of each (query, key) pair of a tile and its halo into rpb with its axes flattened, `[queries * keys]`.

    A pair outside the window has the index after the last: a column of -inf is kept there.
    """
    index = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    visible = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for axis, tile in zip(axes, tiles, strict=True):
        query = torch.arange(tile.queries, device="cpu")[:, None] + tile.query_start
        key = torch.arange(tile.keys, device="cpu") + tile.key_start
        first, end = torch.tensor(tile.windows, device="cpu").T[..., None]
        seen = (key - tile.key_start >= first) & (key - tile.key_start < end)
        offset = torch.where(seen, key - query + axis.window - 1, 0)
        shape = (index.shape[0] * tile.queries, index.shape[1] * tile.keys)
        index = (index[:, None, :, None] * (2 * axis.window - 1) + offset[:, None, :]).reshape(shape)
        visible = (visible[:, None, :, None] & seen[:, None, :]).reshape(shape)
    outside = 1
    for axis in axes:
        outside *= 2 * axis.window - 1
    return torch.where(visible, index, outside).flatten().to(device)
