"""Hugging Face image data sets from Parquet files on this machine, memory-mapped."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config_data import ParquetConfig
from training.data.decode import Decoder, EncodedImages
from training.data.images import Splits
from training.data.tables import first_line, make_splits, missing_package, name_classes
from training.errors import DataError, did_you_mean

# How the Hub names the files of a split: train-00000-of-00005.parquet, or train.parquet.
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}


class ParquetImages(EncodedImages):
    """Rows of a table with a column of image files, each as its bytes or its path."""

    def __init__(self, table: Any, column: str, targets: list[int], decoder: Decoder, name: str) -> None:
        self.table, self.column, self.targets, self.decoder, self.name = table, column, targets, decoder, name

    def read(self, index: int) -> bytes:
        cell = self.table[index][self.column]
        if cell is None or not (cell["bytes"] or cell["path"]):
            raise ValueError("the cell is empty")
        return cell["bytes"] or Path(cell["path"]).read_bytes()

    def label(self, index: int) -> str:
        cell = self.table[index][self.column]
        path = cell["path"] if cell is not None else None
        return f"row {index} of {self.name}" + (f" ({path})" if path else "")


def open_parquet(config: ParquetConfig) -> Splits:
    """The splits that the files hold; where there is none for validation, one drawn from the training images.

    Raises:
        DataError: a file is missing or broken, or has other columns or classes.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing_package("parquet", error) from error
    datasets.disable_progress_bars()
    files = find_files(config)
    tables = {part: load_table(paths, config) for part, paths in files.items()}
    classes = label_names(tables["train"], config.label_column)
    parts = {}
    for part, table in tables.items():
        where = f"data.{part}: {Path(files[part][0]).name}"
        labels = table[config.label_column][:]
        if part != "train" and (own := label_names(table, config.label_column)) not in (None, classes):
            raise DataError(f"{where} has the classes {own}, but the training images have {classes}")
        classes, targets = name_classes(labels, classes, where)
        parts[part] = ParquetImages(table, config.image_column, targets, Decoder(config.draft), f"{part} split")
    return make_splits(
        classes, parts["train"], parts.get("val"), parts.get("test"), config.validation_fraction, config.split_seed
    )


def find_files(config: ParquetConfig) -> dict[str, list[str]]:
    """Files of each split.

    Raises:
        DataError: there is none for training, or a pattern matches nothing.
    """
    if config.root is None:
        found = {}
        for part, pattern in (("train", config.train), ("val", config.val), ("test", config.test)):
            if pattern is not None:
                found[part] = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
                if not found[part]:
                    raise DataError(f"data.{part}={pattern}: no file matches")
        return found
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root: there is no folder {root}")
    paths = sorted(root.rglob("*.parquet"))
    found = {}
    for part, names in SPLIT_NAMES.items():
        split = re.compile(rf"({'|'.join(names)})([-.]|$)")
        members = [path for path in paths if split.match(path.name) or path.parent.name in names]
        if members:
            check_complete(members)
            found[part] = [str(path) for path in members]
    if "train" not in found:
        raise DataError(f"data.root: {root} holds no train-*.parquet; name the files: data.train=PATTERN")
    return found


def check_complete(paths: Sequence[Path]) -> None:
    """Refuse a split of which a file NAME-00003-of-00010.parquet is missing, and name it."""
    names = {path.name for path in paths}
    for path in paths:
        numbered = re.fullmatch(r"(.*-)(\d+)-of-(\d+)(.*\.parquet)", path.name)
        if numbered is None:
            continue
        head, digits, count, tail = numbered.groups()
        for number in range(int(count)):
            expected = f"{head}{number:0{len(digits)}d}-of-{count}{tail}"
            if expected not in names:
                raise DataError(f"there is no shard {path.with_name(expected)}, one of {int(count)}")


def load_table(paths: list[str], config: ParquetConfig) -> Any:
    """The rows of some files, images left encoded.

    Raises:
        DataError: a file is broken, or has not the columns asked for.
    """
    import datasets
    from pyarrow import ArrowException, parquet

    for path in paths:
        try:
            columns = parquet.read_schema(path).names
        except (ArrowException, OSError) as error:
            raise DataError(
                f"cannot read shard {path}: {first_line(error)}; it is truncated or no Parquet file"
            ) from error
        for key, column in (("data.image_column", config.image_column), ("data.label_column", config.label_column)):
            if column not in columns:
                hint = did_you_mean(column, columns)
                raise DataError(f"{key}={column}: {path} has the columns {', '.join(columns)}{hint}")
    try:
        table = datasets.load_dataset("parquet", data_files=paths, split="train", cache_dir=config.cache_dir)
        return table.select_columns([config.image_column, config.label_column]).cast_column(
            config.image_column, datasets.Image(decode=False)
        )
    except (datasets.exceptions.DatasetsError, ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot read {', '.join(paths[:3])}: {first_line(error)}") from error


def label_names(table: Any, column: str) -> list[str] | None:
    """Class names where the table knows them."""
    names = getattr(table.features[column], "names", None)
    return list(names) if names is not None else None
