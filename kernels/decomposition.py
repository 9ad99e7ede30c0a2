"""The operator as a graph of PyTorch's own functions, for exporters that know nothing of fastna::forward.

Tables, made once per axis from the window arithmetic, say which queries and keys make up each tile and which bias
belongs to each pair, so that a call is a few gathers, two matrix products and a softmax however long the map. Any
number of axes, and every option; the batch may be symbolic, the space may not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kernels import operators
from kernels.problem import Axis

# Queries of a tile along one axis, by rank: long enough that neighbours share most keys, short enough that few keys of
# the halo lie outside a query's window.
TILE = {1: 64, 2: 8, 3: 4}


class decomposed(TorchFunctionMode):
    """Inside, the operator runs, and is traced, as PyTorch's own functions.

    What `torch.export.export` records then needs nothing of this project, and exports to ONNX. A decomposition table
    would not do: it may not bring new constants into an exported program.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return attend(*args) if func is operators.forward else func(*args, **(kwargs or {}))


class Tables(NamedTuple):
    """Tiles of one axis as tokens. A short tile repeats its last query and hides the keys that it lacks."""

    queries: tuple[tuple[int, ...], ...]  # [tiles, queries]
    keys: tuple[tuple[int, ...], ...]  # [tiles, keys]
    offsets: tuple[tuple[tuple[int, ...], ...], ...]  # [tiles, queries, keys] into rpb; 2 * window - 1 where hidden
    places: tuple[int, ...]  # where each token lies among all tiles' queries

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tiles, queries of each, keys of each."""
        return len(self.queries), len(self.queries[0]), len(self.keys[0])


@lru_cache(maxsize=256)
def axis_tables(axis: Axis, longest: int) -> Tables:
    """Tiles of at most `longest` queries of one dilation group each."""
    tiles: list[tuple[list[int], list[int], list[list[int]]]] = []
    hidden = 2 * axis.window - 1
    for group in range(axis.dilation):
        length = axis.group_length(group)
        size = -(-length // -(-length // longest))
        for start in range(0, length, size):
            positions = range(start, min(start + size, length))
            windows = [axis.window_at(position, length) for position in positions]
            halo = range(min(first for first, _ in windows), max(end for _, end in windows))
            offsets = [
                [key - position + axis.window - 1 if first <= key < end else hidden for key in halo]
                for position, (first, end) in zip(positions, windows, strict=True)
            ]
            queries, keys = ([p * axis.dilation + group for p in run] for run in (positions, halo))
            tiles.append((queries, keys, offsets))
    most_queries = max(len(queries) for queries, _, _ in tiles)
    most_keys = max(len(keys) for _, keys, _ in tiles)
    places = [0] * axis.length
    for tile, (queries, keys, offsets) in enumerate(tiles):
        for row, token in enumerate(queries):
            places[token] = tile * most_queries + row
        for offset_row in offsets:
            offset_row += [hidden] * (most_keys - len(keys))
        keys += keys[-1:] * (most_keys - len(keys))
        offsets += offsets[-1:] * (most_queries - len(queries))
        queries += queries[-1:] * (most_queries - len(queries))
    return Tables(
        tuple(tuple(queries) for queries, _, _ in tiles),
        tuple(tuple(keys) for _, keys, _ in tiles),
        tuple(tuple(map(tuple, offsets)) for _, _, offsets in tiles),
        tuple(places),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    window: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """What fastna::forward computes: output `[batch, *space, heads, value_dim]` and lse `[batch, *space, heads]`."""
    space, rank = query.shape[1:-2], len(window)
    sizes = zip(space, window, dilation, stride, is_causal, strict=True)
    axes = [Axis(int(length), k, d, s, causal) for length, k, d, s, causal in sizes]
    tables = [axis_tables(axis, TILE[rank]) for axis in axes]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key_heads, shared = key.shape[-2], query.shape[-2] // key.shape[-2]

    queries = _tiles(query.to(dtype) * scale, [table.queries for table in tables])  # [batch, tiles, heads, rows, dim]
    queries = queries.unflatten(2, (key_heads, shared))
    keys = _with_additional(_tiles(key.to(dtype), [table.keys for table in tables]), additional_keys)
    values = _with_additional(_tiles(value.to(dtype), [table.keys for table in tables]), additional_values)

    scores = queries @ keys.unsqueeze(3).mT  # [batch, tiles, key_heads, shared, rows, columns]
    bias = _bias(rpb, axes, tables, query.device, dtype)
    bias = bias.unsqueeze(1) if rpb is None else bias.unflatten(1, (key_heads, shared))
    scores = scores + F.pad(bias, (0, scores.shape[-1] - bias.shape[-1]))
    output = scores.softmax(-1) @ values.unsqueeze(3)
    lse = scores.logsumexp(-1, keepdim=True)
    return _untile(output.flatten(2, 3), tables).to(query.dtype), _untile(lse.flatten(2, 3), tables).squeeze(-1)


def _index(table: Any, device: torch.device) -> Tensor:
    return torch.tensor(table, dtype=torch.long, device=device).flatten()


def _tiles(tensor: Tensor, tables: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """`[batch, *space, heads, dim]` as `[batch, tiles, heads, tokens, dim]`, by each axis's table [tiles, tokens]."""
    rank = len(tables)
    for axis, table in enumerate(tables):
        tensor = tensor.index_select(1 + axis, _index(table, tensor.device))
    for axis in reversed(range(rank)):
        tensor = tensor.unflatten(1 + axis, (len(tables[axis]), len(tables[axis][0])))
    outer, inner = range(1, 1 + 2 * rank, 2), range(2, 2 + 2 * rank, 2)
    tensor = tensor.permute(0, *outer, 1 + 2 * rank, *inner, 2 + 2 * rank)
    return tensor.flatten(2 + rank, 1 + 2 * rank).flatten(1, rank)


def _untile(tensor: Tensor, tables: Sequence[Tables]) -> Tensor:
    """The inverse of `_tiles` on queries: `[batch, tiles, heads, rows, dim]` as `[batch, *space, heads, dim]`."""
    rank = len(tables)
    sizes = [table.sizes for table in tables]
    tensor = tensor.unflatten(3, [rows for _, rows, _ in sizes]).unflatten(1, [tiles for tiles, _, _ in sizes])
    pairs = [place for axis in range(rank) for place in (1 + axis, 2 + rank + axis)]
    tensor = tensor.permute(0, *pairs, 1 + rank, 2 + 2 * rank)
    for axis, table in enumerate(tables):
        tensor = tensor.flatten(1 + axis, 2 + axis).index_select(1 + axis, _index(table.places, tensor.device))
    return tensor


def _with_additional(tensor: Tensor, additional: Tensor | None) -> Tensor:
    """`[batch, tiles, key_heads, columns, dim]` with `additional` `[batch, n, key_heads, dim]` behind every tile's."""
    if additional is None:
        return tensor
    extra = additional.to(tensor.dtype).transpose(1, 2).unsqueeze(1)
    return torch.cat((tensor, extra.expand(-1, tensor.shape[1], -1, -1, -1)), 3)


def _bias(
    rpb: Tensor | None, axes: Sequence[Axis], tables: Sequence[Tables], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """`[tiles, heads, rows, columns]`, -inf where a key is hidden; of one head and zeros in place of no `rpb`."""
    rank = len(axes)
    if rpb is None:
        rpb = torch.zeros((1, *(2 * axis.window - 1 for axis in axes)), dtype=dtype, device=device)
    bias = F.pad(rpb.to(dtype), (0, 1) * rank, value=-math.inf)
    for axis, table in enumerate(tables):
        bias = bias.index_select(1 + axis, _index(table.offsets, device))
    for axis in reversed(range(rank)):
        bias = bias.unflatten(1 + axis, tables[axis].sizes)
    tiles, rows, columns = (range(1 + part, 1 + 3 * rank, 3) for part in range(3))
    bias = bias.permute(*tiles, 0, *rows, *columns)
    return bias.flatten(1 + 2 * rank, 3 * rank).flatten(1 + rank, 2 * rank).flatten(0, rank - 1)
