"""Tar shards in webdataset's layout, served like any other list of images."""

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.config_data import ShardsConfig
from training.data.decode import Decoder, EncodedImages
from training.data.images import Splits
from training.data.sampling import stream_order
from training.data.tables import missing_package, name_classes
from training.data.tar import OpenShards, ShardStore
from training.errors import DataError

INDEX = "index.json"
FORMAT = "fastna-shards-1"


@dataclass(frozen=True)
class Shard:
    """A shard and the classes of its images, which are known without opening it."""

    url: str
    targets: list[int]


class ShardImages(EncodedImages):
    """The images of some shards, in the shards' order.

    Args:
        streams, window: of the order they are trained in, see `sampling.stream_order`.
    """

    def __init__(self, shards: list[Shard], store: ShardStore, decoder: Decoder, streams: int, window: int) -> None:
        self.shards, self.decoder, self.streams, self.window = shards, decoder, streams, window
        self.targets = [target for shard in shards for target in shard.targets]
        self.counts = np.array([len(shard.targets) for shard in shards], np.int64)
        self.ends = self.counts.cumsum()
        self._open = OpenShards(store)

    def _place(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.shards[number], index - int(self.ends[number] - self.counts[number])

    def read(self, index: int) -> bytes:
        shard, place = self._place(index)
        opened = self._open[shard.url]
        if len(opened.contents.key) != len(shard.targets):
            raise DataError(
                f"shard {shard.url} holds {len(opened.contents.key)} images, where {INDEX} says"
                f" {len(shard.targets)}: fetch or pack it again"
            )
        return opened.read(place)

    def label(self, index: int) -> str:
        shard, place = self._place(index)
        try:
            return f"{self._open[shard.url].contents.key[place]} of {shard.url}"
        except DataError:
            return f"number {place} of {shard.url}"

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of an epoch's images; few shards are read at a time."""
        return stream_order(self.counts, self.streams, self.window, seed, epoch)


def open_shards(config: ShardsConfig) -> Splits:
    """Shards listed by an index.json, or found by patterns and then looked into once.

    Raises:
        DataError: a shard is missing or broken, or its labels are not those of the training shards.
    """
    try:
        import webdataset  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package("shards", error) from error
    store = ShardStore(config.cache_dir)
    classes, parts = read_index(config.root, store) if config.root is not None else scan_patterns(config, store)
    for part in ("train", "val"):
        if not any(len(shard.targets) for shard in parts.get(part, [])):
            raise DataError(f"data={config.name}: there are no images of the {part} split")
    decoder = Decoder(config.draft)
    images = {
        part: ShardImages(shards, store, decoder, config.streams, config.shuffle_window)
        for part, shards in parts.items()
    }
    return Splits(classes, images["train"], images["val"], images.get("test", images["val"]))


def read_index(root: str, store: ShardStore) -> tuple[list[str], dict[str, list[Shard]]]:
    """Class names and shards of a packed folder, or of a URL that serves one.

    Raises:
        DataError: there is no index.json, or a shard that it names is missing.
    """
    remote = "://" in root
    address = f"{root.rstrip('/')}/{INDEX}"
    try:
        content: Any = json.loads((store.local(address) if remote else Path(address).expanduser()).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        classes = [str(name) for name in content["classes"]]
        parts = {
            part: [Shard(f"{root.rstrip('/')}/{shard['name']}", list(shard["targets"])) for shard in shards]
            for part, shards in content["splits"].items()
        }
    except FileNotFoundError as error:
        hint = "write it with scripts/pack_shards.py, or name the shards: data.train=PATTERN data.val=PATTERN"
        raise DataError(f"data.root: there is no {address}; {hint}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.root: cannot read {address}: {error}") from error
    for shards in parts.values():
        for shard in shards:
            if not remote and not Path(shard.url).expanduser().is_file():
                raise DataError(f"there is no shard {shard.url}, which {address} names: fetch or pack it again")
    return classes, parts


def scan_patterns(config: ShardsConfig, store: ShardStore) -> tuple[list[str], dict[str, list[Shard]]]:
    """Class names and shards that the patterns match, each looked into."""
    found: dict[str, list[tuple[str, list[int | str]]]] = {}
    for part, pattern in (("train", config.train), ("val", config.val), ("test", config.test)):
        if pattern is not None:
            urls = expand(pattern, f"data.{part}")
            found[part] = [(url, _labels(store.contents(store.local(url)).label)) for url in urls]
    names = None
    if config.classes is not None:
        try:
            names = Path(config.classes).expanduser().read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"data.classes: cannot read {config.classes}: {error.strerror}") from error
    every = [label for _, labels in found["train"] for label in labels]
    classes, _ = name_classes(every, names, "a training shard")
    parts = {
        part: [Shard(url, name_classes(labels, classes, f"shard {url}")[1]) for url, labels in shards]
        for part, shards in found.items()
    }
    return classes, parts


def expand(pattern: str, key: str) -> list[str]:
    """Paths and URLs that a pattern means: {000..099}, a::b and ${NAME} as webdataset has them, and local globs.

    Raises:
        DataError: a pattern matches nothing.
    """
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(pattern)
    except (AssertionError, ValueError) as error:
        raise DataError(f"{key}={pattern}: {error}") from error
    found: list[str] = []
    for url in urls:
        if "://" not in url and not url.startswith("pipe:") and glob.has_magic(url):
            matches = sorted(glob.glob(str(Path(url).expanduser())))
            if not matches:
                raise DataError(f"{key}={pattern}: no shard matches {url}")
            found += matches
        else:
            found.append(url)
    return found


def _labels(texts: np.ndarray) -> list[int | str]:
    """Labels as numbers where all are."""
    words = [str(text) for text in texts]
    return [int(word) for word in words] if all(word.isdecimal() for word in words) else list(words)
