"""What every model here is made of: neighborhood attention, the block around it, and the patch embedding.

Everything is channels-last, `[batch, height, width, channels]`; only convolutions see channels first, as views of
channels-last memory, so that nothing is copied between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import checkpoint, register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import na2d
from kernels.layer_norm import LayerNorm
from kernels.linear import Linear
from kernels.packing import unbind

HEAD_DIM = 32
"""Every published model has heads of 32 channels, whatever its width."""


def fit_window(size: list[int], window: list[int], dilation: list[int]) -> tuple[list[int], list[int]]:
    """The window and dilation that a map of `size` tokens can hold, per axis.

    The window shrinks to the map, then the dilation to what is left: `min(k, n)` and `min(d, n // window)`.
    """
    fitted = [min(window[axis], n) for axis, n in enumerate(size)]
    return fitted, [min(dilation[axis], n // fitted[axis]) for axis, n in enumerate(size)]


def widest_dilations(
    image_size: int | Sequence[int], kernel_size: int = 7, strides: Sequence[int] = (4, 8, 16, 32)
) -> tuple[int, ...]:
    """Per level, the dilation that spreads a `kernel_size` window over the whole map of an `image_size` px image.

    The published dilations: 8, 4, 2, 1 at 224 px; 13, 6, 3, 1 at 384 px; 8, 4, 2, 1 for an 11 x 11 window at 384 px
    (*Dilated Neighborhood Attention Transformer*, arXiv 2209.15001). The shorter side decides.
    """
    side = image_size if isinstance(image_size, int) else min(image_size)
    return tuple(max(-(-side // stride) // kernel_size, 1) for stride in strides)


def alternate(dilation: int | Sequence[int], depth: int, name: str) -> tuple[int, ...]:
    """One dilation for each of `depth` blocks: an int d means 1, d, 1, d, ...; a sequence is taken as it is.

    Raises ValueError when a sequence has not `depth` entries, or a dilation is below 1; `name` names the argument.
    """
    each = (
        tuple(dilation if block % 2 else 1 for block in range(depth)) if isinstance(dilation, int) else tuple(dilation)
    )
    if len(each) != depth:
        raise ValueError(f"{name} has {len(each)} entries for {depth} blocks; give one per block, or one int")
    if any(d < 1 for d in each):
        raise ValueError(f"{name} = {each}: a dilation is at least 1")
    return each


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth that rises linearly from 0 at the first of `depth` blocks to `rate` at the last."""
    return [rate * block / max(depth - 1, 1) for block in range(depth)]


def resample_rpb(rpb: Tensor, size: list[int]) -> Tensor:
    """Biases by position `[heads, *offsets]` resampled bicubically to `[heads, *size]`, as for the published files."""
    resized = F.interpolate(rpb[None].float(), size=size, mode="bicubic", align_corners=False)[0]
    return resized.to(rpb.dtype)


def fit_rpb(rpb: Tensor, window: list[int]) -> Tensor:
    """Bias `[heads, 2*k - 1, 2*k - 1]` for a `window` other than k: cropped about offset zero where the window shrinks,
    resampled where it grows (which only attention over a whole map ever asks for)."""
    needed = [2 * k - 1 for k in window]
    grown = [max(n, rpb.shape[1 + axis]) for axis, n in enumerate(needed)]
    if grown != list(rpb.shape[1:]):
        rpb = resample_rpb(rpb, grown)
    for axis, n in enumerate(needed):
        rpb = rpb.narrow(1 + axis, (grown[axis] - n) // 2, n)
    return rpb


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Attention of every token to the window around it, on maps `[batch, height, width, dim]` of any size.

    The window shrinks where the map is smaller than it (`fit_window`), and the bias is cropped with it. `is_global`
    attends to the whole map instead, with `kernel_size` the map its bias was made for. `backend` names one of
    `kernels`' backends; None lets `kernels` choose. Parameters are named as in the published files.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        head_dim: int = HEAD_DIM,
        is_global: bool = False,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim = {dim} is not a multiple of head_dim = {head_dim}")
        self.num_heads = dim // head_dim
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.is_global = is_global
        self.backend = backend
        self.rpb = nn.Parameter(torch.zeros(self.num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def window_for(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """Window and dilation used on a map of `height` x `width` tokens."""
        if self.is_global:
            return [height, width], [1, 1]
        return fit_window([height, width], [self.kernel_size] * 2, [self.dilation] * 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[batch, height, width, heads, head_dim]`: views of one product, not copies."""
        return unbind(self.qkv(x).unflatten(-1, [3, self.num_heads, -1]))

    def forward(self, x: Tensor) -> Tensor:
        window, dilation = self.window_for(x.shape[1], x.shape[2])
        query, key, value = self.project(x)
        rpb = fit_rpb(self.rpb, window)
        if torch.jit.is_scripting():
            # TorchScript knows the registered operator, but no arguments that are an int or a sequence.
            x = torch.ops.fastna.forward(
                query, key, value, rpb, None, None, window, dilation, [1, 1], [False, False], query.shape[-1] ** -0.5,
                self.backend,
            )[0]  # fmt: skip
        else:
            x = na2d(query, key, value, window, dilation=dilation, rpb=rpb, backend=self.backend)
        return self.proj_drop(self.proj(x.flatten(-2)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The published ViT-RPB files hold the index of each pair into `rpb`, which follows from the map's size.
        state_dict.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        reach = "global" if self.is_global else f"dilation={self.dilation}"
        return f"kernel_size={self.kernel_size}, {reach}, num_heads={self.num_heads}, backend={self.backend}"


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, `[..., dim]` to the same."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block on `[batch, height, width, dim]`; with `init_values`, LayerScale on both branches."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        mlp_ratio: float = 4.0,
        head_dim: int = HEAD_DIM,
        is_global: bool = False,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        attn_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.gamma1 = None if init_values is None else nn.Parameter(torch.full((dim,), init_values))
        self.gamma2 = None if init_values is None else nn.Parameter(torch.full((dim,), init_values))
        self.norm1 = LayerNorm(dim, feeds_linear=True)
        self.attn = NeighborhoodAttention(
            dim,
            kernel_size,
            dilation,
            head_dim=head_dim,
            is_global=is_global,
            proj_drop=proj_drop,
            backend=attn_backend,
        )
        self.norm2 = LayerNorm(dim, feeds_linear=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _forward(self, x: Tensor) -> Tensor:
        attended = self.attn(self.norm1(x))
        x = x + self.drop_path(attended if self.gamma1 is None else self.gamma1 * attended)
        mixed = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed if self.gamma2 is None else self.gamma2 * mixed)

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            return checkpoint(self._forward, x)
        return self._forward(x)


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int, axes: tuple[int, int]) -> Tensor:
    """`x` with zeros below and to the right, so that its (height, width) `axes`, negative, are multiples."""
    pad = [0] * (2 * max(-axis for axis in axes))
    for axis in axes:
        pad[2 * (-axis - 1) + 1] = -x.shape[axis] % multiple
    return F.pad(x, pad) if any(pad) else x


def to_channels_last(x: Tensor) -> Tensor:
    """`[batch, channels, height, width]` in channels-last memory, as `[batch, height, width, channels]`: a view."""
    return x.permute(0, 2, 3, 1)


def to_channels_first(x: Tensor) -> Tensor:
    """`[batch, height, width, channels]` as `[batch, channels, height, width]` in channels-last memory: a view."""
    return x.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Images `[batch, in_chans, height, width]` to tokens `[batch, height / patch, width / patch, dim]`, rounded up:
    one convolution of `patch_size` pixels and as much stride, then LayerNorm. Images are padded to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, self.patch_size, (-2, -1))
        return self.norm(to_channels_last(self.proj(x.contiguous(memory_format=torch.channels_last))))


def init_weights(module: nn.Module) -> None:
    """Linear layers and biases by position: truncated normal of 0.02; convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, NeighborhoodAttention):
        trunc_normal_(module.rpb, std=0.02)
