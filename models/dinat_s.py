"""DiNAT_s: Swin's layout, non-overlapping patches and patch merging, with dilated neighborhood attention.

Paper: *Dilated Neighborhood Attention Transformer* (arXiv 2209.15001) by Ali Hassani and Humphrey Shi. The weights are
theirs, published under the MIT licence; the parameters here carry the names of their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from kernels.layer_norm import LayerNorm
from kernels.linear import Linear
from models.backbone import Level, PyramidBackbone, pyramid_blocks
from models.layers import HEAD_DIM, PatchEmbed, pad_to_multiple
from models.pretrained import AT_384, IN22K, build, published, with_22k_head

__all__ = ["DiNATs"]


class PatchMerging(nn.Module):
    """`[batch, height, width, dim]` to `[batch, height / 2, width / 2, 2 * dim]`, rounded up: the four tokens of every
    2 x 2 patch side by side, LayerNorm, and one Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, feeds_linear=True)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2, (-3, -2))
        # Column by column within a patch: (even row, even column), (odd, even), (even, odd), (odd, odd).
        corners = [x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class DiNATs(PyramidBackbone):
    """DiNAT_s; the arguments are those of `models.nat.NAT`, the levels are named `layers`."""

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        dilations: Sequence[int | Sequence[int]] | None = None,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        head_dim: int = HEAD_DIM,
        patch_size: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        attn_backend: str | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        layers = []
        for index, blocks in enumerate(
            pyramid_blocks(
                embed_dim,
                depths,
                dilations,
                drop_path_rate,
                kernel_size=kernel_size,
                mlp_ratio=mlp_ratio,
                head_dim=head_dim,
                proj_drop=proj_drop_rate,
                attn_backend=attn_backend,
            )
        ):
            dim = embed_dim * 2**index
            layers.append(Level(blocks, PatchMerging(dim) if index < len(depths) - 1 else nn.Identity()))
            info = {"num_chs": dim, "reduction": patch_size * 2**index, "module": f"layers.{index}.blocks"}
            self.feature_info.append(info)
        self.layers = nn.Sequential(*layers)
        self._finish(dim, global_pool, drop_rate)


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": published("dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": published("dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": published("dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k": published("dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large_384.in22k_ft_in1k": published(
            "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384.pth", **AT_384
        ),
        "dinat_s_large_21k.in22k": published("dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth", **IN22K),
    }
)

_TINY: dict[str, Any] = {"embed_dim": 96, "depths": (2, 2, 6, 2), "drop_path_rate": 0.2}
_SMALL: dict[str, Any] = {"embed_dim": 96, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
_BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "drop_path_rate": 0.5}
_LARGE: dict[str, Any] = {"embed_dim": 192, "depths": (2, 2, 18, 2), "drop_path_rate": 0.35}
_AT_224 = (8, 4, 2, 1)
_AT_384 = (13, 6, 3, 1)


def _dinat_s(
    variant: str,
    pretrained: bool,
    defaults: dict[str, Any],
    kwargs: dict[str, Any],
    dilations: tuple[int, ...] = _AT_224,
) -> DiNATs:
    arguments = {**defaults, "dilations": dilations, **kwargs}
    return build(DiNATs, variant, pretrained, arguments, out_indices=(0, 1, 2, 3))


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _dinat_s("dinat_s_tiny", pretrained, _TINY, kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _dinat_s("dinat_s_small", pretrained, _SMALL, kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _dinat_s("dinat_s_base", pretrained, _BASE, kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _dinat_s("dinat_s_large", pretrained, _LARGE, kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    return _dinat_s("dinat_s_large_384", pretrained, _LARGE, kwargs, _AT_384)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    defaults = with_22k_head({**_LARGE, "drop_path_rate": 0.2}, pretrained)
    return _dinat_s("dinat_s_large_21k", pretrained, defaults, kwargs)
