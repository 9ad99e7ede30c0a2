"""Pictures and packings that the tests of the readers share."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from scripts.pack_shards import main as pack_shards

CLASSES = ["one", "two", "zero"]  # in alphabetical order, which is not that of the digits
# A short run that draws every kind of random number; what a reader needs is added.
SHORT = [
    "model=dinat_digits",
    "augmentation=light",
    "augmentation.hflip=0.5",
    "augmentation.reprob=0.25",
    "data.image_size=32",
    "data.in_chans=1",
    "data.mean=[0.3]",
    "data.std=[0.3]",
    "data.batch_size=16",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "trainer=cpu",
    "evaluate=false",
    "logger=csv",
    "callbacks.checkpoint.every_n_steps=1",
]


def write_digits(root: Path, start: int, count: int) -> None:
    """`count` drawings of 0, 1 and 2, every other one a JPEG, of different sizes."""
    digits = load_digits(n_class=3)
    for index in range(start, start + count):
        folder = root / ("zero", "one", "two")[digits.target[index]]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((digits.images[index] * 15).astype(np.uint8)).resize((24 + index % 3 * 8, 32))
        picture.save(folder / (f"{index:03d}.png" if index % 2 else f"{index:03d}.jpg"))


def pack(source: Path, target: Path, *options: str) -> Path:
    pack_shards([str(source), str(target), *options])
    return target
