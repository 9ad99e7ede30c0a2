"""Whether a method's answer is right, at any size: sampled rows of output and gradients against float64.

Nothing larger than a few windows is computed, so that a problem whose reference would not fit anywhere is checked like
a small one. Heads, batch items and queries are drawn with a fixed seed. The gradient of the bias is a sum over the
whole batch and cannot be sampled: it is left to the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from kernels.problem import Problem

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
TF32_TOLERANCE = 1e-3
CHUNK = 2**24  # (query, key) pairs held at once while the gradient of one key is summed


@dataclass(frozen=True)
class Inputs:
    """One set of operands: query, key, value and grad_output `[batch, *space, heads, head_dim]`, rpb or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    rpb: Tensor | None


@dataclass(frozen=True)
class Answer:
    """What a method computed, shaped like the inputs: output and, if wanted, query's, key's and value's gradients."""

    output: Tensor
    gradients: tuple[Tensor, ...] | None


def tolerance(case: Case) -> float:
    """The largest relative error that counts as right; float32 products may be TF32 where PyTorch allows it."""
    tf32 = case.dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TF32_TOLERANCE if tf32 else TOLERANCE[case.dtype]


class _Error:
    """`||got - expected|| / ||expected||`, summed up row by row."""

    def __init__(self) -> None:
        self.wrong = self.whole = 0.0

    def add(self, got: Tensor, expected: Tensor) -> None:
        self.wrong += float((got.detach().double() - expected).square().sum())
        self.whole += float(expected.square().sum())

    @property
    def value(self) -> float:
        return (self.wrong / self.whole) ** 0.5 if self.whole else math.inf if self.wrong else 0.0


def sampled_error(case: Case, inputs: Inputs, answer: Answer) -> float:
    """The largest relative error among the output and the gradients of query, key and value, over sampled rows.

    Up to 48 rows of the output and of query's gradient, all heads of each; 4 rows of key's and value's gradients, one
    head of each: such a row sums over every query that sees the key. `inputs.rpb` counts if the case has a bias.
    """
    problem = case.problem(inputs.query.device)
    queries, keys = 48 if problem.window_size < 2**12 else 8, 4
    generator = torch.Generator().manual_seed(0)

    def place() -> tuple[int, ...]:
        return tuple(int(torch.randint(n, (1,), generator=generator)) for n in (case.batch, *case.space))

    output, grad_query, grad_key, grad_value = _Error(), _Error(), _Error(), _Error()
    for _ in range(queries):
        at = place()
        expected, gradient = _query_row(problem, inputs, at)
        output.add(answer.output[at], expected)
        if answer.gradients:
            grad_query.add(answer.gradients[0][at], gradient)
    for _ in range(keys if answer.gradients else 0):
        at = place()
        head = int(torch.randint(case.heads, (1,), generator=generator))
        expected_key, expected_value = _key_row(problem, inputs, at, head)
        assert answer.gradients
        grad_key.add(answer.gradients[1][at][head], expected_key)
        grad_value.add(answer.gradients[2][at][head], expected_value)
    compared = [output]
    if answer.gradients:
        # A softmax over one key is constant: the gradients of query and key are then nothing but rounding.
        compared += [grad_value] if problem.window_size == 1 else [grad_query, grad_key, grad_value]
    errors = [error.value for error in compared]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _query_row(problem: Problem, inputs: Inputs, at: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Output and gradient `[heads, head_dim]` of the query at (item, *token)."""
    item, *token = at
    device = inputs.query.device
    keys, offsets = [], []
    for axis, i in zip(problem.axes, token, strict=True):
        group, position = i % axis.dilation, i // axis.dilation
        positions = torch.arange(*axis.window_at(position, axis.group_length(group)), device=device)
        keys.append(positions * axis.dilation + group)
        offsets.append(positions - position + axis.window - 1)
    box = torch.meshgrid(*keys, indexing="ij")
    key, value = (x.detach()[item][box].flatten(0, -3).double() for x in (inputs.key, inputs.value))
    query, grad_output = (x.detach()[at].double() for x in (inputs.query, inputs.grad_output))
    scores = torch.einsum("hd,nhd->hn", query, key) * problem.scale
    if inputs.rpb is not None and problem.rpb_dtype is not None:
        grid = torch.meshgrid(*offsets, indexing="ij")
        scores = scores + inputs.rpb.detach().double()[(slice(None), *(g.flatten() for g in grid))]
    weights = scores.softmax(-1)
    grad_weights = torch.einsum("hd,nhd->hn", grad_output, value)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    return (
        torch.einsum("hn,nhd->hd", weights, value),
        torch.einsum("hn,nhd->hd", grad_scores, key) * problem.scale,
    )


def _key_row(problem: Problem, inputs: Inputs, at: tuple[int, ...], head: int) -> tuple[Tensor, Tensor]:
    """Gradients `[head_dim]` of the key and the value at (item, *token): sums over the queries that see it."""
    item, *token = at
    device = inputs.query.device
    queries, keys, visible, offsets = [], [], [], []
    for axis, i in zip(problem.axes, token, strict=True):
        group, position = i % axis.dilation, i // axis.dilation
        length = axis.group_length(group)
        seeing = range(*axis.queries_at(position, length))
        windows = [axis.window_at(q, length) for q in seeing]
        first, last = min(start for start, _ in windows), max(end for _, end in windows)
        along = torch.arange(first, last, device=device)
        starts, ends = torch.tensor(windows, device=device).T
        rows = torch.tensor(seeing, device=device)
        queries.append(rows * axis.dilation + group)
        keys.append(along * axis.dilation + group)
        visible.append((along >= starts[:, None]) & (along < ends[:, None]))
        offsets.append((along - rows[:, None] + axis.window - 1).clamp(0, 2 * axis.window - 2))
    key_box = torch.meshgrid(*keys, indexing="ij")
    key, value = (
        x.detach()[(item, *key_box)][..., head, :].flatten(0, -2).double() for x in (inputs.key, inputs.value)
    )
    here = int(torch.stack([k == i for k, i in zip(key_box, token, strict=True)]).all(0).flatten().nonzero())
    # Which row of each axis a query is, for the axes' masks and offsets: `[queries]` per axis.
    grid = torch.meshgrid(*(torch.arange(len(q), device=device) for q in queries), indexing="ij")
    rows_of = [rows.flatten() for rows in grid]
    grad_key, grad_value = torch.zeros_like(key[0]), torch.zeros_like(value[0])
    for some in torch.arange(len(rows_of[0]), device=device).split(max(1, CHUNK // len(key))):
        rows = [row[some] for row in rows_of]
        tokens = (item, *(q[row] for q, row in zip(queries, rows, strict=True)))
        query, grad_output = (x.detach()[tokens][..., head, :].double() for x in (inputs.query, inputs.grad_output))
        scores = query @ key.T * problem.scale
        if inputs.rpb is not None and problem.rpb_dtype is not None:
            index = _spread([offset[row] for offset, row in zip(offsets, rows, strict=True)])
            scores = scores + inputs.rpb.detach()[head].double()[index].flatten(1)
        mask = torch.ones((), dtype=torch.bool, device=device)
        for part in _spread([seen[row] for seen, row in zip(visible, rows, strict=True)]):
            mask = mask & part
        weights = scores.masked_fill(~mask.flatten(1), -math.inf).softmax(-1)
        grad_weights = grad_output @ value.T
        grad_scores = weights[:, here] * (grad_weights[:, here] - (weights * grad_weights).sum(-1))
        grad_key += grad_scores @ query * problem.scale
        grad_value += weights[:, here] @ grad_output
    return grad_key, grad_value


def _spread(parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Per axis `[queries, keys along it]`, as views that broadcast to `[queries, *keys of all axes]`."""
    rank = len(parts)
    return tuple(
        part.view(len(part), *(part.shape[1] if axis == own else 1 for axis in range(rank)))
        for own, part in enumerate(parts)
    )
