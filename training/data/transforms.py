"""Augmentation and preprocessing, both by timm."""

from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from torch import Tensor
from torchvision import transforms

from training.config import AugmentationConfig, DataConfig

Transform = Callable[[Image.Image], Tensor]


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each channel; none of them leaves black.

    At magnitude 10 timm's RandAugment asks for 0 bits, which Pillow refuses since version 12.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


for name, operation in list(auto_augment.NAME_TO_OP.items()):
    if operation is auto_augment.posterize:
        auto_augment.NAME_TO_OP[name] = posterize


def train_transform(data: DataConfig, augmentation: AugmentationConfig) -> Transform:
    """Random affine move (where asked for), then timm's training pipeline; [c, image_size, image_size] float32."""
    pipeline = create_transform(
        input_size=(data.in_chans, data.image_size, data.image_size),
        is_training=True,
        scale=tuple(augmentation.scale),
        ratio=tuple(augmentation.ratio),
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
        re_prob=augmentation.reprob,
        re_mode=augmentation.remode,
    )
    degrees, shift, zoom = augmentation.affine_degrees, augmentation.affine_translate, augmentation.affine_scale
    if not (degrees or shift or zoom):
        return pipeline
    move = transforms.RandomAffine(
        degrees,
        translate=(shift, shift),
        scale=(1 - zoom, 1 + zoom),
        interpolation=transforms.InterpolationMode.BILINEAR,
    )
    return transforms.Compose([move, pipeline])


def eval_transform(data: DataConfig) -> Transform:
    """Resize, centre crop, normalise; [c, image_size, image_size] float32."""
    return create_transform(
        input_size=(data.in_chans, data.image_size, data.image_size),
        is_training=False,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )
