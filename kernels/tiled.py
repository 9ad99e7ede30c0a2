"""Batched matrix products over query tiles and their halos, in plain PyTorch: any device, any option.

For each class of alike tiles (see `tiles.py`), the tiles of a chunk are copied out through strided views, scores start
as the class's bias (with -inf outside the windows) and the product is added to them. A chunk holds a bounded number of
scores, so the working set does not grow with the map. Where windows are whole dilation groups, a tile is a group and
there is no mask.

Copies convert to the accumulation dtype: float16 and bfloat16 are computed in float32 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from kernels.backend import Gradients, Operands
from kernels.problem import Axis, Problem
from kernels.tiles import TileClass, bias_index, tile_classes, tile_view

# Scores in flight. On a CPU they stay in a core's own cache between the passes, as long as the calls themselves cost
# little beside them; a GPU wants launches that fill it.
CHUNK_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}

# Columns are padded to a multiple of a vector register (16 floats with AVX-512, 8 with AVX2): a softmax over 49 scores
# takes three times as long as one over 64.
VECTOR = 16


class Workspace:
    """Buffers that the chunks of one call use in turn, by name."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._like = like
        self._dtype = dtype

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor; it is overwritten by the next `take` of the same name."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=self._dtype)
        return buffer[:size].view(shape)


class Tiles:
    """One class of tiles in one call: its views of the operands, its bias, its chunks.

    Products run over `[matrices, rows, columns]`: a matrix is one tile and one key head; its rows are the tile's
    queries for each of the query heads that share the key head, its columns the halo's keys, then the additional ones,
    then padding: zeros with a bias of -inf.
    """

    def __init__(self, problem: Problem, operands: Operands, tiles: TileClass, workspace: Workspace) -> None:
        self.problem = problem
        self.operands = operands
        self.tiles = tiles
        self.workspace = workspace
        self.queries = math.prod(tile.queries for tile in tiles)
        self.keys = math.prod(tile.keys for tile in tiles)
        self.columns = -(-(self.keys + problem.additional) // VECTOR) * VECTOR
        self.shared = problem.heads // problem.key_heads
        self.rows = self.shared * self.queries
        self.outer = (problem.batch, *(size for tile in tiles for size in (tile.groups, tile.tiles)))
        self.bias = self._bias()
        self.query = self.rows_view(operands.query)
        self.key = self.columns_view(operands.key)
        self.value = self.columns_view(operands.value)

    def rows_view(self, tensor: Tensor) -> Tensor:
        """`[batch, *space, heads, dim]` as `[*outer, key_heads, shared, *queries, dim]`."""
        view = tile_view(tensor, self.problem, self.tiles, keys=False)
        view = view.unflatten(-2, (self.problem.key_heads, self.shared))
        rank = self.problem.rank
        return view.movedim((-3, -2), (-3 - rank, -2 - rank))

    def columns_view(self, tensor: Tensor) -> Tensor:
        """`[batch, *space, key_heads, dim]` as `[*outer, key_heads, *keys, dim]`."""
        return tile_view(tensor, self.problem, self.tiles, keys=True).movedim(-2, -2 - self.problem.rank)

    def chunks(self) -> Iterator[tuple[slice, ...]]:
        """Slices of the outer dimensions, each of a bounded number of scores."""
        limit = CHUNK_SCORES.get(self.problem.device.type, CHUNK_SCORES["cpu"])
        room = max(limit // (self.problem.key_heads * self.rows * self.columns), 1)
        steps = []
        for size in reversed(self.outer):
            step = min(size, room)
            room //= step
            steps.append(range(0, size, step))
        for starts in product(*reversed(steps)):
            yield tuple(
                slice(start, min(start + reach.step, size))
                for start, reach, size in zip(starts, reversed(steps), self.outer, strict=True)
            )

    def read_rows(self, name: str, view: Tensor, chunk: tuple[slice, ...]) -> Tensor:
        """The chunk's part of a `rows_view` as matrices `[matrices, rows, dim]`."""
        part = view[chunk]
        buffer = self.workspace.take(name, *part.shape)
        return buffer.copy_(part).view(-1, self.rows, part.shape[-1])

    def read_columns(self, name: str, view: Tensor, additional: Tensor | None, chunk: tuple[slice, ...]) -> Tensor:
        """The chunk's part of a `columns_view`, additional keys or values behind, as `[matrices, columns, dim]`."""
        part = view[chunk]
        dim = part.shape[-1]
        lead = part.shape[: len(self.outer) + 1]
        buffer = self.workspace.take(name, *lead, self.columns, dim)
        buffer[..., : self.keys, :].view(part.shape).copy_(part)
        end = self.keys
        if additional is not None:
            end += additional.shape[1]
            items = additional[chunk[0]].transpose(1, 2)
            buffer[..., self.keys : end, :] = items.reshape(
                items.shape[0], *(1,) * (len(self.outer) - 1), *items.shape[1:]
            )
        buffer[..., end:, :].zero_()
        return buffer.view(-1, self.columns, dim)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """`scale * query key^T + bias`, -inf outside the windows, `[matrices, rows, columns]`."""
        scores = self.workspace.take("scores", query.shape[0], self.rows, self.columns)
        if self.bias is not None:
            scores.view(-1, self.problem.key_heads, self.shared, self.queries, self.columns).copy_(self.bias)
        beta = 0 if self.bias is None else 1
        return torch.baddbmm(scores, query, key.mT, beta=beta, alpha=self.problem.scale, out=scores)

    def _bias(self) -> Tensor | None:
        """`[key_heads, shared, queries, columns]` (or 1, 1, queries, columns): rpb, 0 for additional keys, -inf outside
        the windows. None if it is zero everywhere."""
        rpb = self.operands.rpb
        problem = self.problem
        if rpb is None:
            dense = self.columns == self.keys + problem.additional and not any(tile.is_masked for tile in self.tiles)
            arguments = (problem.axes, self.tiles, problem.additional, self.columns)
            return None if dense else _mask(*arguments, problem.device, problem.accumulation_dtype)
        table = rpb.flatten(1).to(problem.accumulation_dtype)
        table = torch.cat((table, table.new_full((problem.heads, 1), -math.inf)), 1)
        inside = table.index_select(1, bias_index(problem.axes, self.tiles, problem.device))
        bias = inside.new_full((problem.key_heads, self.shared, self.queries, self.columns), -math.inf)
        bias[..., : self.keys] = inside.view(*bias.shape[:-1], self.keys)
        bias[..., self.keys : self.keys + problem.additional] = 0
        return bias


@lru_cache(maxsize=256)
def _mask(
    axes: tuple[Axis, ...],
    tiles: TileClass,
    additional: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    index = bias_index(axes, tiles, device).view(1, 1, math.prod(tile.queries for tile in tiles), -1)
    outside = math.prod(2 * axis.window - 1 for axis in axes)
    mask = torch.full((*index.shape[:-1], columns), -math.inf, dtype=dtype, device=device)
    mask[..., : index.shape[-1] + additional] = 0
    mask[..., : index.shape[-1]].masked_fill_(index == outside, -math.inf)
    return mask


class Tiled:
    """Batched matrix products over tiles."""

    name = "tiled"

    def why_not(self, problem: Problem) -> str | None:
        return None

    def forward(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
        shape = (problem.batch, *problem.space, problem.heads)
        output = operands.query.new_empty((*shape, problem.value_dim))
        lse = operands.query.new_empty((*shape, 1), dtype=problem.accumulation_dtype)
        workspace = Workspace(output, problem.accumulation_dtype)
        for tiles in tile_classes(problem.axes):
            part = Tiles(problem, operands, tiles, workspace)
            output_view, lse_view = part.rows_view(output), part.rows_view(lse)
            for chunk in part.chunks():
                # Value takes key's place, output takes query's: less to hold in the cache.
                query = part.read_rows("rows", part.query, chunk)
                key = part.read_columns("columns", part.key, operands.additional_keys, chunk)
                scores = part.scores(query, key)
                largest = scores.amax(-1, keepdim=True)
                p = torch.softmax(scores, -1, out=scores)
                # The largest score's share of the sum is exp(largest - lse).
                target = lse_view[chunk]
                target.copy_((largest - p.amax(-1, keepdim=True).log_()).view(target.shape))
                value = part.read_columns("columns", part.value, operands.additional_values, chunk)
                result = torch.bmm(p, value, out=workspace.take("rows", *p.shape[:2], problem.value_dim))
                target = output_view[chunk]
                target.copy_(result.view(target.shape))
        return output, lse.squeeze(-1)

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        needs_rpb_grad: bool,
    ) -> Gradients:
        is_rounded = problem.dtype != problem.accumulation_dtype
        delta = _delta(problem, output, grad_output, grad_lse, is_rounded)
        sums = _Sums(problem, operands, needs_rpb_grad)
        workspace = Workspace(output, problem.accumulation_dtype)
        for tiles in tile_classes(problem.axes):
            part = Tiles(problem, operands, tiles, workspace)
            delta_view, grad_output_view = part.rows_view(delta), part.rows_view(grad_output)
            grad_query_view = part.rows_view(sums.query)
            bias_sum = (
                part.workspace.take("bias", problem.key_heads, part.rows, part.columns).zero_()
                if needs_rpb_grad
                else None
            )
            for chunk in part.chunks():
                query = part.read_rows("query", part.query, chunk)
                key = part.read_columns("key", part.key, operands.additional_keys, chunk)
                value = part.read_columns("value", part.value, operands.additional_values, chunk)
                do = part.read_rows("grad_output", grad_output_view, chunk)
                own_delta = part.read_rows("delta", delta_view, chunk)

                # A tile holds all keys of its queries: softmax gives p without lse, faster than exp of the difference.
                scores = part.scores(query, key)
                p = torch.softmax(scores, -1, out=scores)
                grad = torch.bmm(p.mT, do, out=workspace.take("grad", *value.shape))
                sums.add_columns(part, chunk, grad, sums.value, sums.additional_values)

                ds = torch.bmm(do, value.mT, out=workspace.take("ds", *p.shape))
                if is_rounded:
                    own_delta += (p * ds).sum(-1, keepdim=True)
                ds = ds.sub_(own_delta).mul_(p)
                if bias_sum is not None:
                    bias_sum += ds.view(-1, *bias_sum.shape).sum(0)
                grad = _scaled_product(ds.mT, query, problem.scale, workspace.take("grad", *key.shape))
                sums.add_columns(part, chunk, grad, sums.key, sums.additional_keys)

                grad = _scaled_product(ds, key, problem.scale, workspace.take("query", *query.shape))
                target = grad_query_view[chunk]
                target.copy_(grad.view(target.shape))
            if bias_sum is not None:
                sums.add_bias(part, bias_sum)
        return sums.gradients()


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def _delta(problem: Problem, output: Tensor, grad_output: Tensor, grad_lse: Tensor | None, is_rounded: bool) -> Tensor:
    """`sum(grad_output * output, -1) - grad_lse`, `[batch, *space, heads, 1]`.

    Without the sum where `output` is rounded to 16 bits, which may put it off by more than ds is large: there it is
    `sum(p * dp, -1)`.
    """
    dtype = problem.accumulation_dtype
    if is_rounded:
        delta = grad_output.new_zeros((*grad_output.shape[:-1], 1), dtype=dtype)
    else:
        delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)
    return delta if grad_lse is None else delta.sub_(grad_lse[..., None])


class _Sums:
    """Gradients in the making. Where tiles share keys, those of key and value are sums, in heads-first memory (longer
    rows); where every tile has keys of its own, they are written in place."""

    def __init__(self, problem: Problem, operands: Operands, needs_rpb_grad: bool) -> None:
        self.problem = problem
        self.operands = operands
        self.query = operands.query.new_empty(operands.query.shape)
        dtype = problem.accumulation_dtype
        self.shares_keys = any(
            tile.queries < axis.group_length(tile.first_group)
            for tiles in tile_classes(problem.axes)
            for axis, tile in zip(problem.axes, tiles, strict=True)
        )
        self.key = self._start(operands.key)
        self.value = self._start(operands.value)
        self.rpb = None
        if needs_rpb_grad:
            self.rpb = self.key.new_zeros((problem.heads, math.prod(problem.rpb_shape[1:]) + 1), dtype=dtype)
        self.additional_keys = self.additional_values = None
        if operands.additional_keys is not None and operands.additional_values is not None:
            self.additional_keys = torch.zeros_like(operands.additional_keys, dtype=dtype).contiguous()
            self.additional_values = torch.zeros_like(operands.additional_values, dtype=dtype).contiguous()

    def _start(self, like: Tensor) -> Tensor:
        """`[batch, *space, key_heads, dim]` to put gradients in."""
        if not self.shares_keys:
            return like.new_empty(like.shape)
        batch, *space, heads, dim = like.shape
        return like.new_zeros((batch, heads, *space, dim), dtype=self.problem.accumulation_dtype).movedim(1, -2)

    def add_columns(
        self, part: Tiles, chunk: tuple[slice, ...], grad: Tensor, to: Tensor, to_additional: Tensor | None
    ) -> None:
        """Adds `grad [matrices, columns, dim]` of a chunk's keys or values to the sum over all tiles."""
        sizes = [piece.stop - piece.start for piece in chunk]
        grad = grad.view(*sizes, self.problem.key_heads, part.columns, -1)
        if to_additional is not None:
            kept = (0, len(sizes), len(sizes) + 1, len(sizes) + 2)
            summed = grad[..., part.keys : part.keys + self.problem.additional, :].sum(
                [i for i in range(grad.dim()) if i not in kept]
            )
            to_additional[chunk[0]] += summed.transpose(1, 2)
        halo = grad[..., : part.keys, :].unflatten(-2, tuple(tile.keys for tile in part.tiles))
        rank = self.problem.rank
        for pieces in product(*(tile.key_pieces() for tile in part.tiles)):
            source = halo[(..., *(slice(*piece) for piece in pieces), slice(None))]
            target = tile_view(to, self.problem, part.tiles, keys=True, pieces=pieces)
            target = target.movedim(-2, -2 - rank)[chunk]
            if self.shares_keys:
                target.add_(source)
            else:
                target.copy_(source)

    def add_bias(self, part: Tiles, grad: Tensor) -> None:
        """Adds `grad [key_heads, rows, columns]`, the sum of ds over the tiles of a class, to the gradient of rpb."""
        assert self.rpb is not None
        pairs = grad[..., : part.keys].reshape(self.problem.heads, -1)
        self.rpb.index_add_(1, bias_index(self.problem.axes, part.tiles, self.problem.device), pairs)

    def gradients(self) -> Gradients:
        operands, rpb = self.operands, None
        if self.rpb is not None:
            rpb = self.rpb[:, :-1].reshape(self.problem.rpb_shape).to(self.problem.rpb_dtype)
        return Gradients(
            query=self.query,
            key=self._finish(self.key, operands.key),
            value=self._finish(self.value, operands.value),
            rpb=rpb,
            additional_keys=None if self.additional_keys is None else self.additional_keys.to(self.query.dtype),
            additional_values=None if self.additional_values is None else self.additional_values.to(self.query.dtype),
        )

    def _finish(self, grad: Tensor, like: Tensor) -> Tensor:
        return like.new_empty(like.shape).copy_(grad) if self.shares_keys else grad


BACKEND = Tiled()
