"""Packs class folders into tar shards (webdataset's layout) or Parquet (Hugging Face's): fewer, larger files.

What is written depends on the pictures, their names and the options alone. Each shard appears whole or not at all; a
packing that was interrupted goes on after the shards that are there, and one of other pictures or options is not
mixed with them.
"""

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.config_data import FolderConfig
from training.data.decode import UNREADABLE, Decoder
from training.data.folder import ImageFiles, open_folder
from training.data.images import Images, Selection
from training.data.shards import FORMAT, INDEX
from training.data.tables import missing_package
from training.data.tar import read_contents
from training.errors import DataError, one_line
from training.files import write_text, written_aside
from training.randomness import derive_seed

PLAN = ".packing.json"  # what an unfinished packing is of
HUB_NAMES = {"train": "train", "val": "validation", "test": "test"}
ROWS_PER_GROUP = 100  # of Parquet: what is read at once for one image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A picture to be packed: its file, class, and name in the shard, unique and without a dot before the extension."""

    path: str
    target: int
    key: str
    extension: str


@dataclass(frozen=True)
class PlannedShard:
    part: str
    name: str
    entries: list[Entry]


@dataclass(frozen=True)
class PackedShard:
    """What index.json says of a shard."""

    name: str
    bytes: int
    targets: list[int]


@dataclass(frozen=True)
class Packing:
    """The result: pictures packed of each part, shards written now and found written, what was left out just now."""

    images: dict[str, int]
    written: int
    kept: int
    broken: list[str]


def pack(
    source: str,
    target: str,
    *,
    layout: str = "tar",
    images_per_shard: int = 1000,
    workers: int = 1,
    check: bool = False,
) -> Packing:
    """Pack ROOT/{train,val[,test]}/CLASS/IMAGE, or ROOT/CLASS/IMAGE split as data=imagefolder splits it.

    Every part is shuffled once, so that a shard holds pictures of all classes. Files are copied as they are.

    Args:
        layout: tar or parquet.
        workers: processes, each of which writes a shard at a time.
        check: decode every picture first; those that cannot be are left out and named.

    Raises:
        DataError: `source` is not laid out so, or `target` holds something else.
    """
    if layout == "parquet":
        try:
            import datasets  # noqa: F401
        except ModuleNotFoundError as error:
            raise missing_package("parquet", error) from error
    splits = open_folder(FolderConfig(name="imagefolder", root=source))
    parts = {"train": splits.train, "val": splits.val} | (
        {"test": splits.test} if splits.test is not splits.val else {}
    )
    shards = [
        shard
        for part, images in parts.items()
        for shard in plan(part, images, splits.classes, images_per_shard, layout)
    ]
    folder = Path(target).expanduser()
    fingerprint = digest(shards, splits.classes, check)
    begin(folder, fingerprint)
    present = [shard for shard in shards if (folder / shard.name).exists()]
    missing = [shard for shard in shards if not (folder / shard.name).exists()]
    jobs = [(shard, folder / shard.name, splits.classes, check) for shard in missing]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            broken = [name for names in pool.map(_write, *zip(*jobs, strict=True)) for name in names] if jobs else []
    else:
        broken = [name for job in jobs for name in _write(*job)]
    counts = finish(folder, fingerprint, shards, splits.classes, layout)
    return Packing(counts, len(missing), len(present), broken)


def plan(part: str, images: Images, classes: list[str], images_per_shard: int, layout: str) -> list[PlannedShard]:
    """Which picture goes into which shard, and under which name."""
    order = np.random.default_rng(derive_seed(0)).permutation(len(images.targets))
    taken: set[str] = set()
    entries = []
    for index in order.tolist():
        path = _path(images, index)
        stem, count = re.sub(r"[^\w-]", "_", path.stem), 1
        key = f"{classes[images.targets[index]]}/{stem}"
        while key in taken:
            count += 1
            key = f"{classes[images.targets[index]]}/{stem}_{count}"
        taken.add(key)
        entries.append(Entry(str(path), images.targets[index], key, path.suffix[1:].lower()))
    pieces = [entries[start : start + images_per_shard] for start in range(0, len(entries), images_per_shard)]
    return [PlannedShard(part, shard_name(part, i, len(pieces), layout), piece) for i, piece in enumerate(pieces)]


def shard_name(part: str, number: int, count: int, layout: str) -> str:
    """train-000003.tar, or as the Hub names Parquet files: train-00003-of-00010.parquet."""
    if layout == "parquet":
        return f"{HUB_NAMES[part]}-{number:05d}-of-{count:05d}.parquet"
    return f"{part}-{number:06d}.tar"


def digest(shards: Sequence[PlannedShard], classes: list[str], check: bool) -> str:
    """Of everything that decides what is written; of a picture its name and size."""
    planned = [
        [
            shard.name,
            [(entry.key, entry.extension, entry.target, os.path.getsize(entry.path)) for entry in shard.entries],
        ]
        for shard in shards
    ]
    return hashlib.sha256(json.dumps([classes, check, planned]).encode()).hexdigest()


def begin(folder: Path, fingerprint: str) -> None:
    """Claim the folder for this packing.

    Raises:
        DataError: another packing, or something else, is in it.
    """
    note = folder / PLAN
    if note.exists():
        if json.loads(note.read_text())["fingerprint"] != fingerprint:
            raise DataError(f"{folder} holds a packing of other pictures or options: choose another folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty, and holds no packing to go on with: choose another folder")
    write_text(note, json.dumps({"fingerprint": fingerprint}) + "\n")


def _write(shard: PlannedShard, path: Path, classes: list[str], check: bool) -> list[str]:
    """Write one shard; returns the names of pictures that were left out."""
    decoder, broken, packed = Decoder(), [], []
    for entry in shard.entries:
        data = Path(entry.path).read_bytes()
        if check:
            try:
                decoder.picture(data)
            except UNREADABLE as error:
                broken.append(f"{entry.path}: {one_line(str(error))}")
                continue
        packed.append((entry, data))
    with written_aside(path) as aside:
        if path.suffix == ".tar":
            _write_tar(aside, packed)
        else:
            _write_parquet(aside, packed, classes)
    return broken


def _write_tar(path: Path, packed: list[tuple[Entry, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for entry, data in packed:
            for extension, content in ((entry.extension, data), ("cls", str(entry.target).encode())):
                member = tarfile.TarInfo(f"{entry.key}.{extension}")  # no owner, no date: equal inputs, equal bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_parquet(path: Path, packed: list[tuple[Entry, bytes]], classes: list[str]) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    schema = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}).arrow_schema
    images = [{"bytes": data, "path": f"{entry.key}.{entry.extension}"} for entry, data in packed]
    table = pyarrow.Table.from_pydict({"image": images, "label": [entry.target for entry, _ in packed]}, schema=schema)
    parquet.write_table(table, path, row_group_size=ROWS_PER_GROUP)


def finish(
    folder: Path, fingerprint: str, shards: Sequence[PlannedShard], classes: list[str], layout: str
) -> dict[str, int]:
    """Write index.json: class names, and for every shard its name, size and the classes of its pictures.

    Returns the number of pictures of each part.
    """
    splits: dict[str, list[dict[str, Any]]] = {}
    for shard in shards:
        path = folder / shard.name
        packed = PackedShard(shard.name, path.stat().st_size, _targets(path))
        splits.setdefault(shard.part, []).append(asdict(packed))
    content = {"format": FORMAT if layout == "tar" else "parquet", "classes": classes, "fingerprint": fingerprint}
    write_text(folder / INDEX, json.dumps({**content, "splits": splits}) + "\n")
    return {part: sum(len(entry["targets"]) for entry in entries) for part, entries in splits.items()}


def _targets(path: Path) -> list[int]:
    """As the shard has them: pictures may have been left out."""
    if path.suffix == ".tar":
        return [int(label) for label in read_contents(path).label]
    from pyarrow import parquet

    return parquet.read_table(path, columns=["label"])["label"].to_pylist()


def _path(images: Images, index: int) -> Path:
    while isinstance(images, Selection):
        images, index = images.images, images.indices[index]
    if not isinstance(images, ImageFiles):
        raise TypeError(f"{type(images).__name__} has no files to pack")
    return images.paths[index]
