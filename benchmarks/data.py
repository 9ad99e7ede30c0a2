"""How many images per second a core reads, decodes and augments, and which step holds it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.config import AugmentationConfig
from training.config_data import DataConfig, FolderConfig, ParquetConfig, ShardsConfig, TimmConfig
from training.data import ImageData, open_splits
from training.data.augment import DeviceAugmentation
from training.data.images import PixelSample, Sample, Selection, collate, collate_pixels
from training.data.packing import pack
from training.data.transforms import train_transform

READERS = ("folder", "shards", "parquet", "timm")
STEPS = ("read", "decode", "augment", "collate", "copy")
DECODERS = ("pil", "draft", "torchvision")
ROUNDS = 3


@dataclass(frozen=True)
class Recipe:
    """What is done to an image: its size afterwards, the batch, the augmentation."""

    image_size: int
    batch_size: int
    augmentation: AugmentationConfig


def write_pictures(root: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """`count` JPEGs in two class folders: noise of falling amplitude over octaves, as large as photographs."""
    random = np.random.RandomState(0)
    width, height = size
    for index in range(count):
        canvas = np.zeros((height, width, 3), np.float32)
        for octave in range(1, 8):
            small = random.randint(0, 256, (3 * 2**octave // 2, 2 * 2**octave, 3)).astype(np.uint8)
            canvas += np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.float32) / 2**octave
        path = root / f"class-{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def reader_config(reader: str, root: Path, scratch: Path, **options: Any) -> DataConfig:
    """The configuration that reads the pictures of `root` by `reader`; packs them into `scratch` where it must."""
    if reader == "folder":
        return FolderConfig(name="imagefolder", root=str(root), **options)
    if reader == "timm":
        return TimmConfig(name="timm", dataset="", root=str(root), val_split=None, **options)
    layout = "tar" if reader == "shards" else "parquet"
    packed = scratch / layout
    if not packed.exists():
        pack(str(root), str(packed), layout=layout)
    cache = str(scratch / "cache")
    if reader == "shards":
        return ShardsConfig(name="shards", root=str(packed), cache_dir=cache, **options)
    return ParquetConfig(name="parquet", root=str(packed), cache_dir=cache, **options)


def seconds(step: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Time of one call, which on a GPU ends when the GPU has finished; and what it returned."""
    start = time.perf_counter()
    result = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def measure_steps(
    images: Any, decoder: str, data: DataConfig, recipe: Recipe, device: torch.device
) -> dict[str, float]:
    """Seconds per image of each step on one core, the fastest of some rounds over one batch of images.

    With `torchvision` the workers only decode, and `augment` happens on `device`.
    """
    indices = np.linspace(0, len(images.targets) - 1, recipe.batch_size, dtype=int).tolist()
    base = images
    if isinstance(images, Selection):
        base, indices = images.images, [images.indices[index] for index in indices]
    transform = train_transform(data, recipe.augmentation)
    on_device = DeviceAugmentation(data, recipe.augmentation) if decoder == "torchvision" else None
    best = dict.fromkeys(STEPS, float("inf"))
    for _ in range(ROUNDS):
        spent = {}
        spent["read"], files = seconds(lambda: [base.read(index) for index in indices], device)
        if on_device is not None:
            spent["decode"], pixels = seconds(lambda f=files: [base.decoder.pixels(data, "RGB") for data in f], device)
            samples = [PixelSample(image, 0, index, index) for image, index in zip(pixels, indices, strict=True)]
            spent["collate"], batch = seconds(lambda s=samples: collate_pixels(s), device)
            spent["copy"], moved = seconds(lambda b=batch: b._replace(pixels=b.pixels.to(device)), device)
            spent["augment"], _ = seconds(lambda m=moved: on_device(m), device)
        else:
            spent["decode"], pictures = seconds(
                lambda f=files: [base.decoder.picture(data).convert("RGB") for data in f], device
            )
            spent["augment"], tensors = seconds(lambda p=pictures: [transform(picture) for picture in p], device)
            samples = [Sample(image, 0, index) for image, index in zip(tensors, indices, strict=True)]
            spent["collate"], batch = seconds(lambda s=samples: collate(s), device)
            spent["copy"], _ = seconds(lambda b=batch: b.image.to(device, copy=True), device)
        best = {step: min(best[step], spent[step] / len(indices)) for step in STEPS}
    return best


def measure_loader(data: ImageData) -> float:
    """Images per second of a whole epoch through the training loader, the workers' start left out."""
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch.target)
    return images / (time.perf_counter() - start) if images else float("nan")


def measure(
    readers: Sequence[str],
    decoders: Sequence[str],
    workers: Sequence[int],
    root: Path,
    scratch: Path,
    recipe: Recipe,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """A record for each reader and decoder."""
    for reader in readers:
        for decoder in decoders:
            config = reader_config(
                reader,
                root,
                scratch,
                image_size=recipe.image_size,
                batch_size=recipe.batch_size,
                draft=recipe.image_size if decoder == "draft" else None,
                workers=0,
            )
            splits = open_splits(config)
            steps = measure_steps(splits.train, decoder, config, recipe, device)
            on_device = decoder == "torchvision"
            of_worker = {step: steps[step] for step in ("read", "decode", "augment", "collate")}
            if on_device:
                del of_worker["augment"]
            record = {
                "reader": reader,
                "decoder": decoder,
                "augmented_on": "device" if on_device else "workers",
                "image_size": recipe.image_size,
                "batch_size": recipe.batch_size,
                "images": len(splits.train.targets),
                **{f"{step}_us": 1e6 * steps[step] for step in STEPS},
                "images_per_second_per_core": 1 / sum(of_worker.values()),
                "bottleneck": max(of_worker, key=of_worker.__getitem__),
            }
            for count in workers:
                config.workers = count
                augmentation = AugmentationConfig(**vars(recipe.augmentation) | {"runs_on": record["augmented_on"]})
                record[f"loader_{count}_workers"] = measure_loader(ImageData(splits, config, augmentation))
            yield record
