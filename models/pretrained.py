"""Where the published weights lie, and how timm builds a model and fetches them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

from models.backbone import Backbone
from models.checkpoints import CheckpointError, checkpoint_filter_fn

PUBLISHED_ROOT = "https://shi-labs.com/projects"

AT_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
IN22K: dict[str, Any] = {"num_classes": 21841}

BackboneT = TypeVar("BackboneT", bound=Backbone)


def published(path: str, **overrides: Any) -> dict[str, Any]:
    """timm's description of a published file at `path` under the authors' site, or of one on the Hugging Face hub when
    `overrides` names its `hf_hub_id`."""
    config = {
        "url": f"{PUBLISHED_ROOT}/{path}" if path else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2209.15001" if "dinat" in (path + overrides.get("hf_hub_id", "")) else "arXiv:2204.07143",
    }
    if "hf_hub_id" in overrides:
        config["hf_hub_filename"] = "pytorch_model.bin"
    return config | overrides


def with_22k_head(defaults: dict[str, Any], pretrained: bool) -> dict[str, Any]:
    """Model defaults of an ImageNet-22k variant: without its weights the head has 1,000 classes, as in the original."""
    return defaults if pretrained else {"num_classes": 1000, **defaults}


def build(
    model_class: type[BackboneT],
    variant: str,
    pretrained: bool,
    arguments: dict[str, Any],
    out_indices: int | tuple[int, ...],
) -> BackboneT:
    """A model of timm's registry, with its published weights when `pretrained`.

    Among the `arguments`, `device` and `dtype` say where and in what the parameters are made, and `features_only=True`
    gives timm's wrapper around the features of `out_indices` instead.
    Raises CheckpointError when the weights cannot be fetched.
    """

    def make(device: torch.device | str | None = None, dtype: torch.dtype | None = None, **rest: Any) -> BackboneT:
        with nullcontext() if device is None else torch.device(device):
            return model_class(**rest).to(dtype=dtype)

    try:
        return build_model_with_cfg(
            make,
            variant,
            pretrained,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            pretrained_filter_fn=checkpoint_filter_fn,
            **arguments,
        )
    except OSError as error:
        if not pretrained:
            raise
        raise CheckpointError(
            f"cannot fetch the published weights of {variant}: {error}; go online once, or fetch the file elsewhere "
            f"and pass it to models.load_checkpoint(model, path)"
        ) from error
