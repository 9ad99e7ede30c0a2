"""Where the images to be predicted come from: files, folders, patterns, tar shards. Read in parallel, in any order."""

import glob
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from training.data.decode import UNREADABLE, Decoder, in_mode
from training.data.folder import EXTENSIONS, is_image
from training.data.tar import END_MARK
from training.errors import DataError, one_line

SHARD = ".tar"


def list_sources(inputs: list[str]) -> list[Path]:
    """The files meant by `inputs`: images and shards themselves; folders' images and shards; patterns' matches.

    `shard-{000..011}.tar` is a pattern too, as for webdataset.

    Raises:
        DataError: one of them means nothing.
    """
    found: list[Path] = []
    for text in inputs:
        for pattern in _expand_braces(text):
            path = Path(pattern).expanduser()
            if path.is_dir():
                paths = [p for p in path.rglob("*") if (is_image(p) or p.suffix == SHARD) and p.is_file()]
            elif path.exists():
                paths = [path]
            else:
                paths = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
            if not paths:
                kinds = ", ".join(sorted(EXTENSIONS | {SHARD}))
                what = f"the folder holds no images ({kinds})" if path.is_dir() else "no such file, folder or pattern"
                raise DataError(f"{pattern}: {what}")
            found += sorted(paths)
    return list(dict.fromkeys(found))


def _expand_braces(text: str) -> list[str]:
    if "{" not in text or Path(text).exists():
        return [text]
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(text))
    except UnbalancedBracesError as error:
        raise DataError(f"{text}: {error}") from error


@dataclass(frozen=True)
class Item:
    """One image: its place among all (source, member), its name, and what the model takes, or why it is unreadable."""

    place: tuple[int, int]
    label: str
    image: Tensor | None
    error: str | None = None


class SourceImages(IterableDataset):
    """Every image of `sources` once; several workers share the sources.

    Args:
        transform: from a picture to what the model takes.
        in_chans: 1 for grey, 3 for RGB.
    """

    def __init__(self, sources: list[Path], transform: Callable[[Image.Image], Tensor], in_chans: int) -> None:
        self.sources, self.transform = sources, transform
        self.mode = "L" if in_chans == 1 else "RGB"
        self.decoder = Decoder()

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, len(self.sources), step):
            source = self.sources[number]
            if source.suffix == SHARD:
                yield from self._shard(number, source)
            else:
                yield self._read((number, 0), str(source), source)

    def _shard(self, number: int, path: Path) -> Iterator[Item]:
        """The images of a tar file, from first to last; what is cut off at its end is one unreadable item."""
        count = 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isfile() and Path(member.name).suffix.lower() in EXTENSIONS:
                        content = archive.extractfile(member)
                        assert content is not None  # a regular file has content
                        yield self._read((number, count), f"{path}/{member.name}", content.read())
                        count += 1
            with path.open("rb") as file:
                file.seek(-len(END_MARK), os.SEEK_END)
                complete = file.read() == END_MARK
            if not complete:
                raise tarfile.ReadError("the shard has no end mark: it is truncated")
        except (tarfile.TarError, EOFError, OSError) as error:
            yield Item((number, count), str(path), None, one_line(f"after {count} images: {error}"))

    def _read(self, place: tuple[int, int], label: str, content: Path | bytes) -> Item:
        try:
            picture = self.decoder.picture(content if isinstance(content, bytes) else content.read_bytes())
            return Item(place, label, self.transform(in_mode(picture, self.mode)))
        except UNREADABLE as error:
            return Item(place, label, None, one_line(str(error)) or type(error).__name__)
