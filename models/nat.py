"""NAT and DiNAT: hierarchical transformers of neighborhood attention, with overlapping convolutions between levels.

Papers: *Neighborhood Attention Transformer* (arXiv 2204.07143) and *Dilated Neighborhood Attention Transformer* (arXiv
2209.15001) by Ali Hassani, Humphrey Shi and others. The weights are theirs, published under the MIT licence; the
parameters here carry the names of their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kernels.layer_norm import LayerNorm
from models.backbone import Level, PyramidBackbone, pyramid_blocks
from models.layers import HEAD_DIM, to_channels_first, to_channels_last
from models.pretrained import AT_384, IN22K, build, published, with_22k_head

__all__ = ["NAT"]


class ConvEmbed(nn.Module):
    """Images `[batch, in_chans, height, width]` to `[batch, height / 4, width / 4, dim]`, rounded up: two overlapping
    convolutions of stride 2 with nothing between, then LayerNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
        )
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_channels_last(self.proj(x.contiguous(memory_format=torch.channels_last))))


class ConvDownsample(nn.Module):
    """`[batch, height, width, dim]` to `[batch, height / 2, width / 2, 2 * dim]`, rounded up, then LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_channels_last(self.reduction(to_channels_first(x))))


class NAT(PyramidBackbone):
    """NAT, and DiNAT where `dilations` exceed 1.

    Args:
        embed_dim: width of the first level; it doubles with each.
        depths: blocks per level.
        dilations: per level an int d (blocks alternate 1, d) or one int per block. None: no dilation.
        kernel_size: the window, on every level and axis; it shrinks on maps smaller than it.
        init_values: LayerScale's initial value; None for none.
        attn_backend: one of `kernels`' backends; None lets `kernels` choose.
    """

    stages_name = "levels"

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        dilations: Sequence[int | Sequence[int]] | None = None,
        kernel_size: int = 7,
        mlp_ratio: float = 3.0,
        head_dim: int = HEAD_DIM,
        init_values: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        attn_backend: str | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.patch_embed = ConvEmbed(in_chans, embed_dim)
        levels = []
        for index, blocks in enumerate(
            pyramid_blocks(
                embed_dim,
                depths,
                dilations,
                drop_path_rate,
                kernel_size=kernel_size,
                mlp_ratio=mlp_ratio,
                head_dim=head_dim,
                init_values=init_values,
                proj_drop=proj_drop_rate,
                attn_backend=attn_backend,
            )
        ):
            dim = embed_dim * 2**index
            levels.append(Level(blocks, ConvDownsample(dim) if index < len(depths) - 1 else nn.Identity()))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**index, "module": f"levels.{index}.blocks"})
        self.levels = nn.Sequential(*levels)
        self._finish(dim, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.levels(self.patch_embed(x)))


def _cfg(path: str = "", **overrides: Any) -> dict[str, Any]:
    return published(path, first_conv="patch_embed.proj.0", **overrides)


default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg("nat/checkpoints/CLS/nat_mini.pth"),
        "nat_mini.in1k_hf": _cfg(hf_hub_id="shi-labs/nat-mini-in1k-224"),
        "nat_tiny.in1k": _cfg("nat/checkpoints/CLS/nat_tiny.pth"),
        "nat_tiny.in1k_hf": _cfg(hf_hub_id="shi-labs/nat-tiny-in1k-224"),
        "nat_small.in1k": _cfg("nat/checkpoints/CLS/nat_small.pth"),
        "nat_small.in1k_hf": _cfg(hf_hub_id="shi-labs/nat-small-in1k-224"),
        "nat_base.in1k": _cfg("nat/checkpoints/CLS/nat_base.pth"),
        "nat_base.in1k_hf": _cfg(hf_hub_id="shi-labs/nat-base-in1k-224"),
        "dinat_mini.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth"),
        "dinat_mini.in1k_hf": _cfg(hf_hub_id="shi-labs/dinat-mini-in1k-224"),
        "dinat_tiny.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat_tiny.in1k_hf": _cfg(hf_hub_id="shi-labs/dinat-tiny-in1k-224"),
        "dinat_small.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth"),
        "dinat_small.in1k_hf": _cfg(hf_hub_id="shi-labs/dinat-small-in1k-224"),
        "dinat_base.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth"),
        "dinat_base.in1k_hf": _cfg(hf_hub_id="shi-labs/dinat-base-in1k-224"),
        "dinat_large.in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k_hf": _cfg(hf_hub_id="shi-labs/dinat-large-in22k-in1k-224"),
        "dinat_large_384.in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth", **AT_384),
        "dinat_large_384.in22k_ft_in1k_hf": _cfg(hf_hub_id="shi-labs/dinat-large-in22k-in1k-384", **AT_384),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **AT_384
        ),
        "dinat_large_384_11x11.in22k_ft_in1k_hf": _cfg(hf_hub_id="shi-labs/dinat-large-11x11-in22k-in1k-384", **AT_384),
        "dinat_large_21k.in22k": _cfg("dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth", **IN22K),
        "dinat_large_21k_11x11.in22k": _cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth", **IN22K
        ),
    }
)

_MINI: dict[str, Any] = {"embed_dim": 64, "depths": (3, 4, 6, 5), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_TINY: dict[str, Any] = {"embed_dim": 64, "depths": (3, 4, 18, 5), "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_SMALL: dict[str, Any] = {"embed_dim": 96, "depths": (3, 4, 18, 5), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE: dict[str, Any] = {
    "embed_dim": 128,
    "depths": (3, 4, 18, 5),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.5,
    "init_values": 1e-5,
}
_LARGE: dict[str, Any] = {"embed_dim": 192, "depths": (3, 4, 18, 5), "mlp_ratio": 2.0, "drop_path_rate": 0.35}
_AT_224 = (8, 4, 2, 1)
_AT_384 = (13, 6, 3, 1)


def _nat(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> NAT:
    return build(NAT, variant, pretrained, {**defaults, **kwargs}, out_indices=(0, 1, 2, 3))


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("nat_mini", pretrained, _MINI, kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("nat_tiny", pretrained, _TINY, kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("nat_small", pretrained, {**_SMALL, "init_values": 1e-5}, kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("nat_base", pretrained, _BASE, kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("dinat_mini", pretrained, {**_MINI, "dilations": _AT_224}, kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("dinat_tiny", pretrained, {**_TINY, "dilations": _AT_224}, kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("dinat_small", pretrained, {**_SMALL, "dilations": _AT_224}, kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("dinat_base", pretrained, {**_BASE, "dilations": _AT_224}, kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("dinat_large", pretrained, {**_LARGE, "dilations": _AT_224}, kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    return _nat("dinat_large_384", pretrained, {**_LARGE, "dilations": _AT_384}, kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    # An 11 x 11 window spans the maps of 384 px at the dilations that a 7 x 7 window has at 224 px.
    defaults = {**_LARGE, "kernel_size": 11, "dilations": _AT_224}
    return _nat("dinat_large_384_11x11", pretrained, defaults, kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    defaults = {**_LARGE, "dilations": _AT_224, "drop_path_rate": 0.2}
    return _nat("dinat_large_21k", pretrained, with_22k_head(defaults, pretrained), kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    # Meant to be fine-tuned at 384 px, where these dilations fit; at 224 px they shrink with the map.
    defaults = {**_LARGE, "kernel_size": 11, "dilations": _AT_224, "drop_path_rate": 0.2}
    return _nat("dinat_large_21k_11x11", pretrained, with_22k_head(defaults, pretrained), kwargs)
