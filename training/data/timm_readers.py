"""Data sets as timm opens them, read at random so that a run resumes in the middle of an epoch.

timm's dataset names a broken image only in a warning and returns another in its place; so images are taken from its
reader, undecoded. Its streams (hfids/, tfds/) cannot be entered at a given image and are refused; wds/ can, by
this project's own reader of shards.
"""

from typing import Any

from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import ImageDataset

from training.config_data import ShardsConfig, TimmConfig
from training.data.decode import Decoder, EncodedImages
from training.data.images import Images, Splits
from training.data.shards import open_shards
from training.data.tables import first_line, make_splits, missing_package, name_classes
from training.errors import DataError

STREAMS = ("hfids", "tfds")


class ReaderImages(EncodedImages):
    """The images of a timm reader (folder, tar, hfds)."""

    def __init__(self, reader: Any, targets: list[int], decoder: Decoder) -> None:
        self.reader, self.targets, self.decoder = reader, targets, decoder

    def read(self, index: int) -> bytes:
        file = self.reader[index][0]
        with file:
            return file.read()

    def label(self, index: int) -> str:
        return f"{self.reader.filename(index) or 'image'} (number {index})"


class VisionImages:
    """The images of a torchvision dataset, which decodes them itself."""

    def __init__(self, dataset: Any, targets: list[int]) -> None:
        self.dataset, self.targets = dataset, targets

    def load(self, index: int) -> Image.Image:
        return self.dataset[index][0]

    def label(self, index: int) -> str:
        return f"number {index} of {type(self.dataset).__name__}"


def open_timm(config: TimmConfig) -> Splits:
    """The splits of a data set that timm knows by name.

    Raises:
        DataError: timm cannot open it, or only as a stream.
    """
    prefix = config.dataset.partition("/")[0].lower() if "/" in config.dataset else ""
    if prefix in STREAMS:
        hint = "hfds/" if prefix == "hfids" else "torch/, hfds/ or a folder"
        raise DataError(
            f"data.dataset={config.dataset}: {prefix}/ is a stream, which cannot be resumed exactly: use {hint}"
        )
    if prefix == "wds":
        return open_shards(as_shards(config))
    names: list[str] | None = None
    parts: dict[str, Images] = {}
    for part, split in (("train", config.train_split), ("val", config.val_split), ("test", config.test_split)):
        if split is not None:
            dataset = create(config, split)
            own = class_names(dataset)
            if names is not None and own is not None and own != names:
                raise DataError(f"data.{part}_split={split} has other classes than data.train_split")
            names, targets = name_classes(labels(dataset), own or names, f"data.{part}_split={split}")
            decoder = Decoder(config.draft)
            parts[part] = (
                ReaderImages(dataset.reader, targets, decoder)
                if isinstance(dataset, ImageDataset)
                else VisionImages(dataset, targets)
            )
    return make_splits(
        names or [], parts["train"], parts.get("val"), parts.get("test"), config.validation_fraction, config.split_seed
    )


def create(config: TimmConfig, split: str) -> Any:
    """timm's dataset of one split; never with code from the data set (trust_remote_code stays off).

    Raises:
        DataError: timm, or the library beneath it, refuses.
    """
    columns = {"input_key": config.input_key, "target_key": config.target_key}
    options = {key: value for key, value in columns.items() if value is not None}
    try:
        return create_dataset(config.dataset, root=config.root, split=split, download=config.download, **options)
    except ModuleNotFoundError as error:
        raise missing_package("timm", error) from error
    except Exception as error:  # each of timm's readers, and the library beneath it, raises its own
        offline = isinstance(error, ConnectionError) or type(error).__name__ == "OfflineModeIsEnabled"
        hint = "; there is no connection: fetch it first, and give data.root" if offline else ""
        where = f"data.dataset={config.dataset} data.root={config.root} split {split}"
        raise DataError(f"timm cannot open {where}: {type(error).__name__}: {first_line(error)}{hint}") from error


def class_names(dataset: Any) -> list[str] | None:
    """Names in the order of the indices, where they are known."""
    source = dataset.reader if isinstance(dataset, ImageDataset) else dataset
    known = getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None)  # the reader of tars
    return [str(name) for name in sorted(known, key=known.get)] if known else None


def labels(dataset: Any) -> list[int]:
    """The class of every image, without decoding one where that can be avoided."""
    source = dataset.reader if isinstance(dataset, ImageDataset) else dataset
    if hasattr(source, "iter_targets"):
        return [int(target) for target in source.iter_targets()]
    targets = getattr(source, "targets", None)
    if targets is None and hasattr(source, "samples"):
        targets = [sample[1] for sample in source.samples]
    if targets is None:
        targets = [dataset[index][1] for index in range(len(dataset))]
    return [int(target) for target in targets]


def as_shards(config: TimmConfig) -> ShardsConfig:
    """What timm calls wds/: shards in a folder, listed by its _info.json or by a pattern given as the split."""
    if config.root is None or config.val_split is None:
        raise DataError(f"data.dataset={config.dataset}: wds/ needs data.root and data.val_split")
    patterns = {}
    for part, split in (("train", config.train_split), ("val", config.val_split), ("test", config.test_split)):
        if split is not None:
            files = create(config, split).reader.split_info.filenames
            patterns[part] = "::".join(f"{config.root}/{name}" for name in files)
    shared = {key: getattr(config, key) for key in ("batch_size", "workers", "image_size", "in_chans", "mean", "std")}
    return ShardsConfig(name=config.name, draft=config.draft, **patterns, **shared)
