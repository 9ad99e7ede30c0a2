"""One frozen description of a neighborhood-attention call, and the arithmetic of its windows.

Every backend computes from a `Problem`; nothing else in the project decides which keys a query sees.
The definition is the one of *Neighborhood Attention Transformer* (arXiv 2204.07143) and *Dilated Neighborhood
Attention Transformer* (arXiv 2209.15001), with strides as in *Generalized Neighborhood Attention* (arXiv 2504.16922).

Along one axis, dilation d splits the tokens into d groups: token i is position `i // d` of group `i % d`. Only tokens
of one group see each other, so everything below speaks of positions inside a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

MAX_RANK = 3


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis: `length` tokens, and a window of `window` keys taken every `dilation` tokens.

    Queries share a window in runs of `stride`; `causal` lets a query see no key behind itself.
    """

    length: int
    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    @property
    def left(self) -> int:
        """Keys left of the window's leader; an even window reaches one further left than right."""
        return self.window // 2

    @property
    def right(self) -> int:
        """Keys right of the window's leader."""
        return self.window // 2 + self.window % 2 - 1

    @property
    def is_dense(self) -> bool:
        """Whether every query sees exactly its whole dilation group: no sliding, no mask."""
        return not self.causal and self.window * self.dilation == self.length

    def group_length(self, group: int) -> int:
        """Tokens in dilation group `group` (0 <= group < dilation)."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def window_at(self, position: int, length: int) -> tuple[int, int]:
        """Keys `[start, end)` that the query at `position` of a group of `length` tokens sees.

        The window is pushed inward at a border, never cut; a causal one is cut on the left.
        """
        first = position // self.stride * self.stride
        if self.causal:
            leader = min(first + self.stride - 1, length - 1)
            return max(leader - self.window + 1, 0), position + 1
        leader = min(first + self.stride // 2, length - 1)
        start = min(max(leader - self.left, 0), length - self.window)
        return start, start + self.window

    def queries_at(self, position: int, length: int) -> tuple[int, int]:
        """Queries `[first, last)` that see the key at `position`: the inverse of `window_at`, an interval too."""
        if self.causal:
            first = position
            reach = position + self.window - self.stride
            everyone = position + self.window >= length
        else:
            behind = position - self.right - self.stride // 2
            first = 0 if position < self.window else max(-(-behind // self.stride), 0) * self.stride
            reach = position + self.left - self.stride // 2
            everyone = position >= length - self.window
        last = length if everyone else min((reach // self.stride + 1) * self.stride, length)
        return first, last


@dataclass(frozen=True, slots=True)
class Problem:
    """A validated call: sizes, windows and types, but no tensors. Hashable, so that plans and kernels are cached by it.

    Shapes, heads last, `space` of rank 1 to 3: query `[batch, *space, heads, head_dim]`, key `[batch, *space,
    key_heads, head_dim]`, value `[batch, *space, key_heads, value_dim]`, output `[batch, *space, heads, value_dim]`,
    lse `[batch, *space, heads]` (natural logarithm, float32, or float64 for float64), rpb `[heads, 2*k_0 - 1, ...]`,
    additional keys and values `[batch, additional, key_heads, ...]`. `key_heads` divides `heads`: query head h reads
    key head `h // (heads // key_heads)`.
    """

    batch: int
    axes: tuple[Axis, ...]
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    additional: int = 0
    rpb_dtype: torch.dtype | None = None
    _hash: int | None = field(default=None, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        """Computed once: a call looks several things up by its problem, and small kernels take ten microseconds.

        Only when asked for: while a graph is traced, sizes may be symbolic, and those cannot be hashed.
        """
        if self._hash is None:
            sizes = (self.batch, self.heads, self.key_heads, self.head_dim, self.value_dim, self.additional)
            known = hash((sizes, self.axes, self.scale, self.dtype, self.device, self.rpb_dtype))
            object.__setattr__(self, "_hash", known)
            return known
        return self._hash

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def space(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def window(self) -> tuple[int, ...]:
        return tuple(axis.window for axis in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        return tuple(axis.dilation for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(axis.stride for axis in self.axes)

    @property
    def is_causal(self) -> tuple[bool, ...]:
        return tuple(axis.causal for axis in self.axes)

    @property
    def has_rpb(self) -> bool:
        return self.rpb_dtype is not None

    @property
    def tokens(self) -> int:
        """Tokens of one map."""
        return math.prod(self.space)

    @property
    def window_size(self) -> int:
        """Keys that one query sees in its window, additional keys not counted."""
        return math.prod(self.window)

    @property
    def rpb_shape(self) -> tuple[int, ...]:
        return (self.heads, *(2 * axis.window - 1 for axis in self.axes))

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """The precision of scores, softmax and lse: float64 for float64, float32 for all else."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_dense(self) -> bool:
        """Every query sees its whole dilation group: dense attention with one fixed bias per head, no mask."""
        return all(axis.is_dense for axis in self.axes)
