"""A set of labelled images, how one is read, and how several become a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from training.data.decode import UNREADABLE, EncodedImages, in_mode, picture_to_pixels
from training.data.sampling import Draw
from training.data.workers import note_reading
from training.errors import DataError, one_line
from training.randomness import seed_generators


class Images(Protocol):
    """Labelled images that are read one at a time. Some have `epoch_order(seed, epoch)`, the order to train in."""

    targets: Sequence[int]

    def load(self, index: int) -> Image.Image:
        """Read and decode one image."""
        ...

    def label(self, index: int) -> str:
        """What a person calls this image, such as its path."""
        ...


@dataclass(frozen=True)
class Splits:
    """A data set: its class names and its three parts.

    `is_subset`: a model may know more classes; it chooses among these only. `accepted`: of each test image, all
    classes that are right, where there can be several.
    """

    classes: list[str]
    train: Images
    val: Images
    test: Images
    is_subset: bool = False
    accepted: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Selection:
    """Some of the images of another set."""

    images: Images
    indices: Sequence[int]

    @property
    def targets(self) -> list[int]:
        return [self.images.targets[i] for i in self.indices]

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.indices[index])

    def label(self, index: int) -> str:
        return self.images.label(self.indices[index])


def load_pixels(images: Images, index: int, mode: str) -> Tensor:
    """Read and decode one image to uint8 [c, h, w]; `mode` is L or RGB."""
    while isinstance(images, Selection):
        images, index = images.images, images.indices[index]
    if isinstance(images, EncodedImages):
        return images.load_pixels(index, mode)
    return picture_to_pixels(in_mode(images.load(index), mode))


class Broken(NamedTuple):
    """An image that could not be read. `fatal`: nor could others, because what holds them is missing or broken."""

    label: str
    reason: str
    fatal: bool = False


class Sample(NamedTuple):
    image: Tensor
    target: int
    index: int


class PixelSample(NamedTuple):
    """A decoded image, not yet augmented: uint8 [c, h, w], and the seed of its augmentation."""

    pixels: Tensor
    target: int
    index: int
    seed: int


class PixelBatch(NamedTuple):
    """Decoded images of any sizes: their `pixels` in a row, uint8, with the `shapes` [c, h, w] that cut it up again."""

    pixels: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    seeds: tuple[int, ...]
    target: Tensor
    index: Tensor
    broken: tuple[Broken, ...] = ()


class Batch(NamedTuple):
    """`image` [n, c, h, w] float32; `target` [n] int64, -1 where an image does not count; `index` [n] into the split;
    and what could not be read."""

    image: Tensor
    target: Tensor
    index: Tensor
    broken: tuple[Broken, ...] = ()


class ImageReader(Dataset):
    """Reads, converts and augments the image that a `Draw` names, with that draw's own randomness."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], in_chans: int) -> None:
        self.images, self.transform = images, transform
        self.mode = "L" if in_chans == 1 else "RGB"
        self.targets = list(images.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def picture(self, index: int) -> Image.Image:
        """The image as stored, decoded and in the channels that the model takes."""
        return in_mode(self.images.load(index), self.mode)

    def __getitem__(self, draw: Draw) -> Sample | PixelSample | Broken:
        note_reading(draw.index)
        try:
            loaded = self._load(draw.index)
        except UNREADABLE as error:
            return Broken(self.images.label(draw.index), one_line(str(error)))
        except DataError as error:
            return Broken(self.images.label(draw.index), str(error), fatal=True)
        return self._sample(loaded, draw)

    def _load(self, index: int) -> Any:
        return self.picture(index)

    def _sample(self, loaded: Any, draw: Draw) -> Sample | PixelSample:
        seed_generators(draw.seed)
        return Sample(self.transform(loaded), self._target(draw), draw.index)

    def _target(self, draw: Draw) -> int:
        return self.targets[draw.index] if draw.counted else -1


class PixelReader(ImageReader):
    """Reads the image that a `Draw` names and leaves augmenting it to the device."""

    def __init__(self, images: Images, in_chans: int) -> None:
        super().__init__(images, picture_to_pixels, in_chans)

    def _load(self, index: int) -> Tensor:
        return load_pixels(self.images, index, self.mode)

    def _sample(self, loaded: Tensor, draw: Draw) -> PixelSample:
        return PixelSample(loaded, self._target(draw), draw.index, draw.seed)


def collate(samples: list[Sample | Broken]) -> Batch:
    """Stack what could be read; pass on the names of what could not."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    broken = tuple(sample for sample in samples if isinstance(sample, Broken))
    image = torch.stack([sample.image for sample in good]) if good else torch.empty(0)
    target = torch.tensor([sample.target for sample in good], dtype=torch.int64)
    index = torch.tensor([sample.index for sample in good], dtype=torch.int64)
    return Batch(image, target, index, broken)


def collate_pixels(samples: list[PixelSample | Broken]) -> PixelBatch:
    """Put the pixels in a row; pass on the names of what could not be read."""
    good = [sample for sample in samples if isinstance(sample, PixelSample)]
    return PixelBatch(
        pixels=torch.cat([sample.pixels.flatten() for sample in good]) if good else torch.empty(0, dtype=torch.uint8),
        shapes=tuple(tuple(sample.pixels.shape) for sample in good),
        seeds=tuple(sample.seed for sample in good),
        target=torch.tensor([sample.target for sample in good], dtype=torch.int64),
        index=torch.tensor([sample.index for sample in good], dtype=torch.int64),
        broken=tuple(sample for sample in samples if isinstance(sample, Broken)),
    )


def stratified_split(
    targets: Sequence[int], classes: Sequence[str], validation: float, test: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Indices of train, validation and test, each with every class in about its share.

    Every class has at least one validation image, and at least one test image when `test` > 0.

    Raises:
        DataError: a class has too few images to appear in every part.
    """
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    random = np.random.RandomState(seed)
    by_class = np.asarray(targets)
    for target, name in enumerate(classes):
        members = random.permutation(np.flatnonzero(by_class == target))
        validation_count = max(1, round(len(members) * validation))
        test_count = max(1, round(len(members) * test)) if test > 0 else 0
        if len(members) <= validation_count + test_count:
            needed = 3 if test > 0 else 2
            raise DataError(
                f"class {name!r} has {len(members)} images: needs {needed} or more to appear in every split"
            )
        cuts = [validation_count, validation_count + test_count]
        for part, chosen in zip((1, 2, 0), np.split(members, cuts), strict=True):
            parts[part].extend(chosen.tolist())
    train, val, held_out = (sorted(part) for part in parts)
    return train, val, held_out
