"""Neighborhood attention for vision transformers trained without it.

Near-sighted attention costs what the image costs, not its square: plain ViTs of timm (DeiT, DINO, DINOv2, DINOv3, CLIP
towers and their like) become usable, and can be fine-tuned, at resolutions where full attention is out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models._features import FeatureGetterNet
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import na2d
from models.layers import fit_window

ModelT = TypeVar("ModelT", bound=nn.Module)


class _Grid:
    """The map that the patches of the images now in the model lie on; a hook before `patch_embed` keeps it current."""

    def __init__(self) -> None:
        self.size = (0, 0)

    def record(self, patch_embed: Any, arguments: tuple[Any, ...]) -> None:
        height, width = arguments[0].shape[-2:]
        self.size = patch_embed.dynamic_feat_size((height, width))


class ConvertedAttention(nn.Module):
    """The attention of a timm transformer on tokens `[batch, prefix + height * width, dim]`, patches near-sighted.

    Patches attend to the window around them and to all prefix tokens (class and register tokens); prefix tokens attend
    to everything. Parameters are the original's, under the same names. The window shrinks on maps smaller than it.
    """

    # Taken over from the original, whose kinds differ in which of them they have.
    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: Any
    k_bias: Any
    v_bias: Any
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    scale: float
    num_heads: int

    def __init__(
        self,
        original: nn.Module,
        prefix: int,
        window: tuple[int, int],
        dilation: tuple[int, int],
        grid: _Grid,
        backend: str | None,
    ) -> None:
        super().__init__()
        # Its parameters, submodules and settings, by the names that state dicts and timm know them by.
        self.__dict__.update(original.__dict__)
        self.prefix = prefix
        self.window = window
        self.dilation = dilation
        self.grid = grid
        self.backend = backend

    def project(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[batch, tokens, heads, head_dim]`, normalised and rotated as the original does."""
        if self.qkv is None:
            query = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
            key = self.k_proj(x).unflatten(-1, (self.num_heads, -1))
            value = self.v_proj(x).unflatten(-1, (self.num_heads, -1))
        else:
            qkv = self.qkv(x)
            if getattr(self, "q_bias", None) is not None:
                qkv = qkv + torch.cat([self.q_bias, self.k_bias, self.v_bias])
            query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = (self._rotate(part, rope).type_as(value) for part in (query, key))
        return query, key, value

    def _rotate(self, part: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = part[:, : self.prefix], part[:, self.prefix :]
        rotated = apply_rot_embed_cat(patches.transpose(1, 2), rope, half=getattr(self, "rotate_half", False))
        return torch.cat([prefix, rotated.transpose(1, 2)], dim=1)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal: a converted attention takes no mask; its window is one")
        height, width = self.grid.size
        if x.shape[1] != self.prefix + height * width:
            raise ValueError(
                f"{x.shape[1]} tokens are not {self.prefix} prefix tokens and a map of {height} x {width} patches; "
                "patches must reach every block whole and in order"
            )
        query, key, value = self.project(x, rope)
        window, dilation = fit_window([height, width], list(self.window), list(self.dilation))
        maps = [part[:, self.prefix :].unflatten(1, (height, width)) for part in (query, key, value)]
        patches = na2d(
            maps[0],
            maps[1],
            maps[2],
            window,
            dilation=dilation,
            scale=self.scale,
            additional_keys=key[:, : self.prefix] if self.prefix else None,
            additional_values=value[:, : self.prefix] if self.prefix else None,
            backend=self.backend,
        )
        output = patches.flatten(1, 2)
        if self.prefix:
            heads_first = [part.transpose(1, 2) for part in (query[:, : self.prefix], key, value)]
            prefix = F.scaled_dot_product_attention(
                heads_first[0], heads_first[1], heads_first[2], scale=self.scale, enable_gqa=True
            )
            output = torch.cat([prefix.transpose(1, 2), output], dim=1)
        output = self.norm(output.flatten(2))
        gate = getattr(self, "gate", None)
        if gate is not None:
            output = output * gate(x).sigmoid()
        return self.proj_drop(self.proj(output))

    def extra_repr(self) -> str:
        return f"window={self.window}, dilation={self.dilation}, prefix={self.prefix}, backend={self.backend}"


def convert_attention(
    model: ModelT,
    window: int | tuple[int, int],
    dilation: int | Sequence[int] = 1,
    *,
    backend: str | None = None,
) -> ModelT:
    """Replace the attention of a timm vision transformer by neighborhood attention, in place; returns the model.

    Args:
        model: a `VisionTransformer` or `Eva` of timm (ViT, DeiT, DINO, DINOv2, DINOv3, EVA-02), or one made with
            `features_only=True`. Make it with `dynamic_img_size=True` to feed it any resolution.
        window: patches that a patch attends to, for both axes or per axis. One that covers the map changes nothing.
        dilation: of every block, or one per block.
        backend: one of `kernels`' backends; None lets `kernels` choose.

    Raises ValueError for a model without such attention, one that drops patches or attention weights, and for a window
    or dilation below 1 or a wrong number of dilations.
    """
    transformer: Any = model.model if isinstance(model, FeatureGetterNet) else model
    blocks: Any = getattr(transformer, "blocks", None)
    patch_embed: Any = getattr(transformer, "patch_embed", None)
    kinds = (Attention, AttentionRope, EvaAttention, ConvertedAttention)
    if (
        not isinstance(blocks, nn.Sequential | nn.ModuleList)
        or not hasattr(patch_embed, "dynamic_feat_size")
        or not all(isinstance(getattr(block, "attn", None), kinds) for block in blocks)
    ):
        raise ValueError(
            f"model = {type(transformer).__name__}: its attention cannot be converted; it must be a plain vision "
            "transformer of timm, such as vit_small_patch14_dinov2"
        )
    windows = (window, window) if isinstance(window, int) else tuple(window)
    dilations = [dilation] * len(blocks) if isinstance(dilation, int) else list(dilation)
    if len(windows) != 2 or min(windows) < 1:
        raise ValueError(f"window = {window}: one int of at least 1, or one per axis")
    if len(dilations) != len(blocks) or min(dilations) < 1:
        raise ValueError(f"dilation = {dilation}: one int of at least 1, or one for each of the {len(blocks)} blocks")
    if not isinstance(getattr(transformer, "patch_drop", None), nn.Identity | None):
        raise ValueError("model: it drops patches, which tears the map apart; make it with patch_drop_rate=0")
    originals: list[Any] = [block.attn for block in blocks]
    if any(original.attn_drop.p > 0 for original in originals):
        raise ValueError("model: neighborhood attention has no attention dropout; make it with attn_drop_rate=0")
    if isinstance(originals[0], ConvertedAttention):
        grid = originals[0].grid
    else:
        grid = _Grid()
        patch_embed.register_forward_pre_hook(grid.record)
    prefix = int(getattr(transformer, "num_prefix_tokens", 0))
    for block, original, d in zip(blocks, originals, dilations, strict=True):
        block.attn = ConvertedAttention(original, prefix, windows, (d, d), grid, backend)
    return model
