"""The definition, written down: dense attention of every query over every key, with a mask. For tests, not for speed.

Memory is quadratic in the number of tokens. Computes in float64 for float64 and in float32 for everything else.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.backend import Gradients, Operands
from kernels.problem import Axis, Problem


@cache
def visible_and_offset(axis: Axis) -> tuple[Tensor, Tensor]:
    """For each pair of an axis: whether the query sees the key, and its index into rpb, both [queries, keys]."""
    visible = torch.zeros(axis.length, axis.length, dtype=torch.bool, device="cpu")
    offset = torch.zeros(axis.length, axis.length, dtype=torch.long, device="cpu")
    for query in range(axis.length):
        position, group = divmod(query, axis.dilation)
        for key_position in range(*axis.window_at(position, axis.group_length(group))):
            key = key_position * axis.dilation + group
            visible[query, key] = True
            offset[query, key] = key_position - position + axis.window - 1
    return visible, offset


def pairs(problem: Problem) -> tuple[Tensor, Tensor]:
    """As `visible_and_offset` for all axes at once, [tokens, tokens]; the index is into rpb with its axes flattened."""
    visible = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    offset = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    for axis in problem.axes:
        axis_visible, axis_offset = visible_and_offset(axis)
        size = visible.shape[0] * axis.length
        visible = (visible[:, None, :, None] & axis_visible[:, None, :]).reshape(size, size)
        offset = (offset[:, None, :, None] * (2 * axis.window - 1) + axis_offset[:, None, :]).reshape(size, size)
    return visible.to(problem.device), offset.to(problem.device)


class Reference:
    """Dense attention under a mask."""

    name = "reference"

    def why_not(self, problem: Problem) -> str | None:
        return None

    def forward(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
        _, _, value, scores = self._scores(problem, operands)
        lse = scores.logsumexp(-1)
        output = (scores - lse[..., None]).exp() @ value
        shape = (problem.batch, *problem.space, problem.heads)
        output = output.transpose(1, 2).reshape(*shape, problem.value_dim).to(problem.dtype)
        return output.contiguous(), lse.transpose(1, 2).reshape(shape).contiguous()

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
        query, key, value, scores = self._scores(problem, operands)
        p = (scores - _heads_first(lse[..., None], problem)).exp()
        do = _heads_first(grad_output, problem)
        dp = do @ value.mT
        # sum(do * output, -1), but free of the rounding of `output` to half precision.
        delta = (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - _heads_first(grad_lse[..., None], problem)
        ds = p * (dp - delta)
        grad_query = problem.scale * ds @ key
        grad_key = _sum_shared_heads(problem.scale * ds.mT @ query, problem)
        grad_value = _sum_shared_heads(p.mT @ do, problem)
        n = problem.tokens
        return Gradients(
            query=_heads_last(grad_query, operands.query),
            key=_heads_last(grad_key[:, :, :n], operands.key),
            value=_heads_last(grad_value[:, :, :n], operands.value),
            rpb=self._rpb_gradient(problem, ds[..., :n]) if needs_rpb_grad else None,
            additional_keys=_maybe_heads_last(grad_key[:, :, n:], operands.additional_keys),
            additional_values=_maybe_heads_last(grad_value[:, :, n:], operands.additional_values),
        )

    def _scores(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value [batch, heads, tokens, dim], additional ones behind the map's, and the masked scores."""
        query = _heads_first(operands.query, problem)
        key = _heads_first(operands.key, problem)
        value = _heads_first(operands.value, problem)
        if operands.additional_keys is not None and operands.additional_values is not None:
            key = torch.cat((key, _heads_first(operands.additional_keys, problem)), 2)
            value = torch.cat((value, _heads_first(operands.additional_values, problem)), 2)
        scores = problem.scale * query @ key.mT
        visible, offset = pairs(problem)
        window = scores[..., : problem.tokens]
        if operands.rpb is not None:
            window += operands.rpb.to(window.dtype).flatten(1)[:, offset]
        window.masked_fill_(~visible, float("-inf"))
        return query, key, value, scores

    def _rpb_gradient(self, problem: Problem, ds: Tensor) -> Tensor:
        visible, offset = pairs(problem)
        grad = ds.new_zeros(problem.rpb_shape).flatten(1)
        grad.index_add_(1, offset[visible], ds.sum(0)[:, visible])
        return grad.reshape(problem.rpb_shape).to(problem.rpb_dtype)


def _heads_first(tensor: Tensor, problem: Problem) -> Tensor:
    """[batch, *tokens, heads or key heads, dim] as [batch, heads, tokens, dim], in the accumulation dtype."""
    tensor = tensor.flatten(1, -3).transpose(1, 2).to(problem.accumulation_dtype)
    return tensor.repeat_interleave(problem.heads // tensor.shape[1], 1)


def _sum_shared_heads(grad: Tensor, problem: Problem) -> Tensor:
    """The gradient of key heads from those of the query heads that read them."""
    return grad.unflatten(1, (problem.key_heads, -1)).sum(2)


def _heads_last(grad: Tensor, like: Tensor) -> Tensor:
    return grad.transpose(1, 2).reshape(like.shape).to(like.dtype).contiguous()


def _maybe_heads_last(grad: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else _heads_last(grad, like)


BACKEND = Reference()
