"""Tar files read at random: a table of contents made once, and each image by its offset.

A shard is written to be read from its beginning to its end. But a run that can be resumed at any batch, with any number
of workers, needs the image at a given place of the order. So a shard's headers are read once, and kept in the cache; a
shard behind a URL is first fetched whole. Images near each other in the order lie in few shards (`sampling.py`), which
the system is asked to read ahead.
"""

import hashlib
import os
import shutil
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock

from training.data.folder import EXTENSIONS
from training.errors import DataError, one_line
from training.files import written_aside

OPEN_SHARDS = 64  # of one process
SAFE_SCHEMES = ("http", "https", "file")
SHELL_URLS = "FASTNA_SHELL_URLS"
END_MARK = bytes(512)


@dataclass(frozen=True)
class Contents:
    """A shard's samples in order: key, text of its label, offset and size of its image in the tar file. All [n]."""

    key: np.ndarray
    label: np.ndarray
    offset: np.ndarray
    size: np.ndarray


def read_contents(path: Path) -> Contents:
    """Read the headers of a shard: samples are successive files that differ from the first dot on, as in webdataset.

    Raises:
        DataError: it is truncated or no tar file, or a sample lacks its image or its .cls.
    """
    keys: list[str] = []
    labels: list[str | None] = []
    places: list[tuple[int, int] | None] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not keys or keys[-1] != key:
                    keys.append(key)
                    labels.append(None)
                    places.append(None)
                if extension == "cls":
                    content = tar.extractfile(member)
                    labels[-1] = content.read().decode("utf-8").strip() if content is not None else None
                elif PurePosixPath(f"_.{extension}").suffix.lower() in EXTENSIONS:
                    places[-1] = (member.offset_data, member.size)
        with path.open("rb") as file:
            file.seek(-len(END_MARK), os.SEEK_END)
            if file.read() != END_MARK:
                raise tarfile.ReadError("it has no end mark")
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        reason = one_line(str(error))
        raise DataError(f"cannot read shard {path}: {reason}; it is truncated or no plain tar file") from error
    for key, label, place in zip(keys, labels, places, strict=True):
        if label is None or place is None:
            lacking = "label (a file KEY.cls)" if label is None else f"image ({', '.join(sorted(EXTENSIONS))})"
            raise DataError(f"shard {path}: sample {key!r} has no {lacking}")
    offset, size = np.array(places, np.int64).reshape(-1, 2).T
    return Contents(np.array(keys, np.str_), np.array(labels, np.str_), offset.copy(), size.copy())


class ShardStore:
    """Shards by path or URL: fetched where they are not local, their contents kept in `folder`.

    Several processes may use one folder at once: files appear in it whole, and each is made by one of them.
    """

    def __init__(self, folder: str | None) -> None:
        chosen = Path(folder).expanduser() if folder is not None else platformdirs.user_cache_path("fastna") / "shards"
        self.folder = chosen

    def local(self, url: str) -> Path:
        """The shard as a file, fetched once if it is not one.

        Raises:
            DataError: there is no such shard, or its URL may not be opened.
        """
        if "://" not in url and not url.startswith("pipe:"):
            path = Path(url).expanduser()
            if not path.is_file():
                raise DataError(f"there is no shard {path}")
            return path
        path = self.folder / f"{_digest(url)}-{PurePosixPath(url).name}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{path.name}.lock")):
                if not path.exists():
                    fetch(url, path)
        return path

    def contents(self, path: Path) -> Contents:
        """A local shard's contents, read from the cache unless the shard has changed since."""
        state = path.stat()
        name = _digest(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}")
        kept = self.folder / f"{name}.npz"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if kept.exists():
                with np.load(kept, allow_pickle=False) as arrays:
                    return Contents(**arrays)
            contents = read_contents(path)
            with written_aside(kept) as aside, aside.open("wb") as file:
                np.savez(file, **vars(contents))
            return contents


def fetch(url: str, path: Path) -> None:
    """Copy what `url` names to `path`, whole or not at all.

    Raises:
        DataError: it cannot be fetched, or its scheme would run a shell command that nobody has allowed.
    """
    import webdataset

    scheme = url.partition(":")[0]
    if scheme not in SAFE_SCHEMES and os.environ.get(SHELL_URLS) != "1":
        raise DataError(
            f"shard {url}: webdataset opens {scheme}: by a shell command, which a configuration must not start;"
            f" if you trust it, set {SHELL_URLS}=1 in the environment"
        )
    try:
        with written_aside(path) as aside, aside.open("wb") as file, webdataset.gopen(url) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot fetch shard {url}: {one_line(str(error))}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class OpenShard:
    """A shard that images are read from."""

    def __init__(self, store: ShardStore, url: str) -> None:
        self.path = store.local(url)
        self.contents = store.contents(self.path)
        self._file = self.path.open("rb")
        if hasattr(os, "posix_fadvise"):  # its images are soon read, out of order, which defeats the usual read-ahead
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def read(self, place: int) -> bytes:
        """The bytes of the image at `place`. Leaves no position behind, so that forked processes can share the file."""
        return os.pread(self._file.fileno(), int(self.contents.size[place]), int(self.contents.offset[place]))

    def close(self) -> None:
        self._file.close()


class OpenShards:
    """The shards that this process has used last, open."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self._open: OrderedDict[str, OpenShard] = OrderedDict()

    def __getitem__(self, url: str) -> OpenShard:
        if url not in self._open:
            self._open[url] = OpenShard(self.store, url)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(url)
        return self._open[url]

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "_open": OrderedDict()}  # a spawned worker opens its own
