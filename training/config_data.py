"""Schemas of configs/data: what every data set has, and where each kind finds its images."""

import os
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from training.errors import ConfigError
from training.rules import require, require_choice

IMAGENET_LABELS = ("real", "v2", "a", "r", "sketch")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "random")


def default_workers() -> int:
    """Processes that read images: four, or one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)


@dataclass
class DataConfig:
    """What every data set has. `batch_size` counts images per process and per forward pass."""

    name: str = MISSING
    batch_size: int = 64
    eval_batch_size: int | None = None  # null: batch_size
    workers: int = field(default_factory=default_workers)
    worker_timeout: float = 600.0  # seconds without a batch after which the run stops and says who hangs; 0: never
    image_size: int = 224
    in_chans: int = 3
    interpolation: str = "bicubic"  # of evaluation
    crop_pct: float = 0.875
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    train_limit: int | None = None  # train on so many images only, drawn once
    broken_image_limit: int = 0  # so many unreadable images are named and skipped; one more stops the run
    draft: int | None = None  # JPEGs are decoded at 1/2, 1/4 or 1/8 while the shorter side keeps so many pixels

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        size = self.eval_batch_size
        require(size is None or size >= 1, "data.eval_batch_size", size, "1 or more")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.worker_timeout >= 0, "data.worker_timeout", self.worker_timeout, "0 or more")
        require(self.image_size >= 1, "data.image_size", self.image_size, "1 or more")
        require(self.in_chans in (1, 3), "data.in_chans", self.in_chans, "1 (grey) or 3 (RGB)")
        require_choice("data.interpolation", self.interpolation, INTERPOLATIONS[:-1])
        require(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "above 0 and at most 1")
        for key in ("mean", "std"):
            values = getattr(self, key)
            rule = f"a list of {self.in_chans} numbers, one per channel (data.in_chans)"
            require(len(values) == self.in_chans, f"data.{key}", values, rule)
        require(all(value > 0 for value in self.std), "data.std", self.std, "above 0")
        limit = self.train_limit
        require(limit is None or limit >= 1, "data.train_limit", limit, "null or 1 or more")
        require(self.broken_image_limit >= 0, "data.broken_image_limit", self.broken_image_limit, "0 or more")
        require(self.draft is None or self.draft >= 1, "data.draft", self.draft, "null or 1 or more")


def require_split(validation: float, test: float) -> None:
    require(0 < validation < 1, "data.validation_fraction", validation, "above 0 and below 1")
    require(0 <= test < 1 - validation, "data.test_fraction", test, "0 or more, and below 1 - data.validation_fraction")


@dataclass
class DigitsConfig(DataConfig):
    """scikit-learn's 1,797 handwritten digits, split by a fixed, stratified draw."""

    validation_fraction: float = 0.1
    test_fraction: float = 0.15
    split_seed: int = 0
    classes: list[int] | None = None  # only these digits, e.g. [0, 1, 2, 3, 4]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_split(self.validation_fraction, self.test_fraction)
        if self.classes is not None:
            known = len(set(self.classes)) == len(self.classes) >= 2 and set(self.classes) <= set(range(10))
            require(known, "data.classes", self.classes, "null or two or more different digits")


@dataclass
class FolderConfig(DataConfig):
    """Class folders: root/{train,val[,test]}/CLASS/*.jpg, or root/CLASS/*.jpg split by a fixed, stratified draw."""

    root: str = MISSING
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_split(self.validation_fraction, self.test_fraction)


@dataclass
class ImageNetConfig(DataConfig):
    """ImageNet-1k as root/{train,val}/SYNSET/*.JPEG; `val` serves as the test set too.

    `labels` chooses another set or other labels to evaluate on: see training/data/imagenet.py.
    """

    root: str = MISSING
    labels: str | None = None
    labels_file: str | None = None  # of labels=real; null: the copy that comes with timm

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None:
            require_choice("data.labels", self.labels, IMAGENET_LABELS)
        only_real = self.labels_file is None or self.labels == "real"
        require(only_real, "data.labels_file", self.labels_file, "null unless data.labels=real")


@dataclass
class ShardsConfig(DataConfig):
    """Tar shards: a folder or URL that scripts/pack_shards.py wrote, or patterns as webdataset takes them."""

    root: str | None = None  # holds index.json, which names classes and shards
    train: str | None = None  # without index.json: path, glob or URL, with {000..099} and ::
    val: str | None = None
    test: str | None = None  # null: val
    classes: str | None = None  # file with a class name per line; null: numbers, or the names that occur
    cache_dir: str | None = None  # of fetched shards and of their tables of contents; null: the user's cache
    streams: int = 8  # shards read side by side; a multiple of the processes keeps each to shards of its own
    shuffle_window: int = 4096  # images of a stream that are shuffled together, after the shards have been

    def __post_init__(self) -> None:
        super().__post_init__()
        require_root_or_patterns(self.root, self.train, self.val, needs_val=True)
        require(self.streams >= 1, "data.streams", self.streams, "1 or more")
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "1 or more")


@dataclass
class ParquetConfig(DataConfig):
    """Hugging Face image data sets as Parquet files on this machine."""

    root: str | None = None  # holds train-*.parquet, {validation,valid,val}-*.parquet, test-*.parquet
    train: str | None = None  # without root: path or glob
    val: str | None = None  # null: validation_fraction of the training images
    test: str | None = None  # null: val
    image_column: str = "image"
    label_column: str = "label"
    cache_dir: str | None = None  # of the memory-mapped tables; null: the library's own
    validation_fraction: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_root_or_patterns(self.root, self.train, self.val, needs_val=False)
        require_split(self.validation_fraction, 0)


@dataclass
class TimmConfig(DataConfig):
    """What timm.data.create_dataset opens: "" (folder or tar), torch/NAME, hfds/NAME, wds/."""

    dataset: str = MISSING
    root: str | None = None
    train_split: str = "train"
    val_split: str | None = "validation"  # null: validation_fraction of the training images
    test_split: str | None = None  # null: val
    input_key: str | None = None  # column of the image and of the label, where not timm's default
    target_key: str | None = None
    download: bool = False
    validation_fraction: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_split(self.validation_fraction, 0)


def require_root_or_patterns(root: str | None, train: str | None, val: str | None, needs_val: bool) -> None:
    either = "data.root (a folder) or data.train and data.val (patterns)" if needs_val else "data.root or data.train"
    if root is None:
        require(train is not None, "data.root", root, f"given: {either}")
        require(val is not None or not needs_val, "data.val", val, f"given: {either}")
    else:
        rule = "null where data.root is given: the images can come from one place only"
        require(train is None, "data.train", train, rule)
        require(val is None, "data.val", val, rule)


DATA_SCHEMAS: dict[str, type[DataConfig]] = {
    "digits": DigitsConfig,
    "folder": FolderConfig,
    "imagenet": ImageNetConfig,
    "shards": ShardsConfig,
    "parquet": ParquetConfig,
    "timm": TimmConfig,
}


def data_from_plain(values: dict[str, Any]) -> DataConfig:
    """The data configuration that a checkpoint carries.

    Raises:
        ConfigError: it names a data set that this version does not know, or has other keys.
    """
    schemas = {"imagefolder" if name == "folder" else name: schema for name, schema in DATA_SCHEMAS.items()}
    name = values.get("name")
    if name not in schemas:
        raise ConfigError(f"data.name={name!r} in the checkpoint: must be one of {', '.join(schemas)}; give data=...")
    try:
        return schemas[name](**values)
    except TypeError as error:
        raise ConfigError(f"data of the checkpoint: {error}; give data=... on the command line") from error
