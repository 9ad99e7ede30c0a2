"""Neighborhood self-attention as a module: packed projection, operator, output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.functional import neighborhood_attention
from kernels.linear import Linear
from kernels.packing import unbind
from kernels.validation import BoolPerAxis, IntPerAxis, bools_per_axis, ints_per_axis


class _NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood self-attention over `[batch, *space, dim]`; the subclasses say over how many axes.

    *Neighborhood Attention Transformer* (arXiv 2204.07143, section 3). Parameters are named as in the published
    checkpoints: `qkv`, `rpb` (`[num_heads, 2 * kernel_size - 1, ...]`), `proj`.

    Args:
        dim: channels; a multiple of `num_heads`.
        num_heads: heads.
        kernel_size: keys per axis; this and the next three are one for all axes or one per axis.
        dilation: tokens from one key to the next.
        stride: queries that share one window.
        is_causal: whether keys behind the query are hidden.
        rel_pos_bias: whether to learn a relative positional bias.
        qkv_bias: whether the packed projection has a bias.
        qk_scale: of the scores; None for `head_dim ** -0.5`.
        proj_drop: dropout after the output projection.
        backend: as in `neighborhood_attention`.
    """

    rank: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: IntPerAxis,
        *,
        dilation: IntPerAxis = 1,
        stride: IntPerAxis = 1,
        is_causal: BoolPerAxis = False,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_heads, int) or num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a positive multiple of num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.kernel_size = tuple(ints_per_axis("kernel_size", kernel_size, self.rank))
        self.dilation = tuple(ints_per_axis("dilation", dilation, self.rank))
        self.stride = tuple(ints_per_axis("stride", stride, self.rank))
        self.is_causal = tuple(bools_per_axis("is_causal", is_causal, self.rank))
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.rpb: nn.Parameter | None
        if rel_pos_bias:
            offsets = [2 * size - 1 for size in self.kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *offsets, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def fit(self, space: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], Tensor | None]:
        """Window, dilation and rpb on a map of size `space`; to override where windows shrink on small maps."""
        return self.kernel_size, self.dilation, self.rpb

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, *space, dim]` to the same. The three slices of the packed projection are taken without a copy."""
        if x.dim() != self.rank + 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; {type(self).__name__} takes [batch, *space, dim], channels last, with "
                f"a space of {self.rank} axes and dim={self.dim}"
            )
        query, key, value = unbind(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)))
        kernel_size, dilation, rpb = self.fit(x.shape[1:-1])
        x = neighborhood_attention(
            query,
            key,
            value,
            kernel_size,
            dilation=dilation,
            stride=self.stride,
            is_causal=self.is_causal,
            rpb=rpb,
            scale=self.scale,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(x.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"stride={self.stride}, is_causal={self.is_causal}, backend={self.backend}"
        )


class NeighborhoodAttention1d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 1


class NeighborhoodAttention2d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 2


class NeighborhoodAttention3d(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 3
