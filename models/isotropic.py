"""Isotropic NAT and DiNAT, and the ViT they are compared with: one resolution of 16 x 16 patches throughout.

Paper: *Dilated Neighborhood Attention Transformer* (arXiv 2209.15001) by Ali Hassani and Humphrey Shi. The weights are
theirs, published under the MIT licence; the parameters here carry the names of their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from models.backbone import Backbone
from models.layers import HEAD_DIM, Block, PatchEmbed, alternate, drop_path_rates
from models.pretrained import build, published

__all__ = ["IsotropicNAT"]


class IsotropicNAT(Backbone):
    """A plain stack of blocks on one map.

    Args:
        embed_dim: width; depth: number of blocks; patch_size: pixels per token and axis.
        dilations: an int d (blocks alternate 1, d) or one int per block.
        kernel_size: the window; with `is_global`, the map that the bias of full attention was made for.
        is_global: full attention with a bias by relative position (ViT-RPB). On maps smaller than `kernel_size` the
            bias is cropped, on larger ones resampled bicubically.
        attn_backend: one of `kernels`' backends; None lets `kernels` choose.
    """

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        dilations: int | Sequence[int] = 1,
        kernel_size: int = 7,
        is_global: bool = False,
        mlp_ratio: float = 4.0,
        head_dim: int = HEAD_DIM,
        patch_size: int = 16,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        attn_backend: str | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        rates = drop_path_rates(drop_path_rate, depth)
        self.layers = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    kernel_size,
                    dilation,
                    mlp_ratio=mlp_ratio,
                    head_dim=head_dim,
                    is_global=is_global,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    attn_backend=attn_backend,
                )
                for dilation, rate in zip(alternate(dilations, depth, "dilations"), rates, strict=True)
            )
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{block}"} for block in range(depth)
        ]
        self._finish(embed_dim, global_pool, drop_rate)


def _cfg(file: str) -> dict[str, Any]:
    return published(f"dinat/checkpoints/isotropic/{file}_in1k_224.pth", pool_size=(14, 14))


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg("nat_isotropic_small"),
        "nat_isotropic_base.in1k": _cfg("nat_isotropic_base"),
        "dinat_isotropic_small.in1k": _cfg("dinat_isotropic_small"),
        "dinat_isotropic_base.in1k": _cfg("dinat_isotropic_base"),
        "vitrpb_small.in1k": _cfg("vitrpb_small"),
        "vitrpb_base.in1k": _cfg("vitrpb_base"),
    }
)

_SMALL: dict[str, Any] = {"embed_dim": 384, "drop_path_rate": 0.1}
_BASE: dict[str, Any] = {"embed_dim": 768, "drop_path_rate": 0.4}
_DILATED: dict[str, Any] = {"dilations": 2}
_GLOBAL: dict[str, Any] = {"is_global": True, "kernel_size": 14}


def _isotropic(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> IsotropicNAT:
    # As in timm's plain vision transformers, features_only gives the last three blocks unless told otherwise.
    return build(IsotropicNAT, variant, pretrained, {**defaults, **kwargs}, out_indices=3)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _isotropic("nat_isotropic_small", pretrained, _SMALL, kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _isotropic("nat_isotropic_base", pretrained, _BASE, kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _isotropic("dinat_isotropic_small", pretrained, _SMALL | _DILATED, kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _isotropic("dinat_isotropic_base", pretrained, _BASE | _DILATED, kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _isotropic("vitrpb_small", pretrained, _SMALL | _GLOBAL, kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return _isotropic("vitrpb_base", pretrained, _BASE | _GLOBAL, kwargs)
