"""Augmentation where the model is: torchvision's transforms on tensors, with each image's own randomness.

The draws are those of timm's pipeline in distribution, not number by number: crop and flips alike; RandAugment with
torchvision's operations, which lack timm's solarize-add and know no cutout; random erasing is timm's own.
"""

import random
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from training.config import AugmentationConfig
from training.config_data import DataConfig
from training.data.images import Batch, PixelBatch
from training.randomness import derive_seed, seed_generators

ERASE = 1  # random erasing draws after normalisation, from a seed of its own
LEVELS = 10  # timm's magnitudes run from 0 to 10
BINS = 31  # torchvision's from 0 to 30
OPERATION_PROBABILITY = 0.5  # of each of timm's RandAugment operations
INTERPOLATIONS = {
    "bilinear": [v2.InterpolationMode.BILINEAR],
    "bicubic": [v2.InterpolationMode.BICUBIC],
    "nearest": [v2.InterpolationMode.NEAREST],
    "random": [v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC],
}


class RandAugment:
    """RandAugment (Cubuk et al., 2020) as timm's `rand-m9-n2-mstd0.5` describes it, on uint8 [c, h, w].

    Args:
        policy: m: magnitude, 0 to 10; n: operations; mstd: its standard deviation (above 100: uniform up to m).
            inc1 is torchvision's nature: a larger magnitude always means a stronger operation.
    """

    def __init__(self, policy: str, fill: list[float]) -> None:
        options = {"m": float(LEVELS), "n": 2.0, "mstd": 0.0}
        for part in policy.split("-")[1:]:
            name = part.rstrip("0123456789.")
            options[name] = float(part[len(name) :])
        self.magnitude, self.operations, self.deviation = options["m"], int(options["n"]), options["mstd"]
        self.by_bin = [v2.RandAugment(1, magnitude, BINS, fill=fill) for magnitude in range(BINS)]

    def __call__(self, image: Tensor) -> Tensor:
        for _ in range(self.operations):
            if random.random() >= OPERATION_PROBABILITY:
                continue
            level = self.magnitude
            if self.deviation > 100:
                level = random.uniform(0, level)
            elif self.deviation > 0:
                level = random.gauss(level, self.deviation)
            image = self.by_bin[round(min(max(level, 0), LEVELS) / LEVELS * (BINS - 1))](image)
        return image


class DeviceAugmentation:
    """Turns decoded images of any sizes into an augmented, normalised batch, on whatever device they are.

    An image's result depends on its pixels and its seed alone, so a resumed run sees the same.
    """

    def __init__(self, data: DataConfig, augmentation: AugmentationConfig) -> None:
        size = [data.image_size, data.image_size]
        fill = [round(255 * value) for value in data.mean]
        steps: list[Any] = []
        degrees, shift, zoom = augmentation.affine_degrees, augmentation.affine_translate, augmentation.affine_scale
        if degrees or shift or zoom:
            steps.append(
                v2.RandomAffine(
                    degrees,
                    translate=(shift, shift),
                    scale=(1 - zoom, 1 + zoom),
                    interpolation=v2.InterpolationMode.BILINEAR,
                )
            )
        self.before = steps
        self.crops = [
            v2.RandomResizedCrop(size, tuple(augmentation.scale), tuple(augmentation.ratio), mode, antialias=True)
            for mode in INTERPOLATIONS[augmentation.interpolation]
        ]
        self.after: list[Any] = []
        if augmentation.hflip:
            self.after.append(v2.RandomHorizontalFlip(augmentation.hflip))
        if augmentation.vflip:
            self.after.append(v2.RandomVerticalFlip(augmentation.vflip))
        if augmentation.auto_augment:
            self.after.append(RandAugment(augmentation.auto_augment, fill))
        elif augmentation.color_jitter:  # as in timm, which leaves colours to RandAugment where there is one
            self.after.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        self.erasing = (
            RandomErasing(augmentation.reprob, mode=augmentation.remode, device="cpu") if augmentation.reprob else None
        )

    def __call__(self, batch: PixelBatch) -> Batch:
        """`image` [n, c, image_size, image_size] float32 on the device of `batch.pixels`."""
        if not batch.shapes:
            return Batch(torch.empty(0), batch.target, batch.index, batch.broken)
        images, start = [], 0
        for shape, seed in zip(batch.shapes, batch.seeds, strict=True):
            end = start + shape[0] * shape[1] * shape[2]
            seed_generators(seed)
            images.append(self._change(batch.pixels[start:end].view(shape)))
            start = end
        device = batch.pixels.device
        image = torch.stack(images).float().div_(255).sub_(self.mean.to(device)).div_(self.std.to(device))
        if self.erasing is not None:
            self.erasing.device = device
            for place, seed in enumerate(batch.seeds):
                seed_generators(derive_seed(seed, ERASE))
                image[place] = self.erasing(image[place])
        return Batch(image, batch.target, batch.index, batch.broken)

    def _change(self, image: Tensor) -> Tensor:
        for step in (*self.before, random.choice(self.crops), *self.after):
            image = step(image)
        return image
