"""Which images make up which batch of which process."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from training.randomness import ORDER, SAMPLE, derive_seed


class Draw(NamedTuple):
    """One image to be read: its index, the seed of its augmentation, and whether it counts in a metric."""

    index: int
    seed: int
    counted: bool = True


def shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: all images, any of them after any other."""
    return np.random.default_rng(derive_seed(ORDER, seed, epoch)).permutation(size)


def stream_order(counts: np.ndarray, streams: int, window: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch of images that lie in shards: few shards are read at a time.

    The shards are shuffled, put in a row and cut into `streams` parts of equal length, each of which is shuffled in
    windows. The streams take turns: place p of the order belongs to stream p mod `streams`. As process r of w gets the
    places that are r mod w, it reads the shards of its own streams only, wherever w divides `streams`; and the
    order itself depends on neither.

    Args:
        counts: [shards] images of each.
        window: images.
    """
    random = np.random.default_rng(derive_seed(ORDER, seed, epoch))
    ends = counts.cumsum()
    row = np.concatenate(
        [np.arange(ends[shard] - counts[shard], ends[shard]) for shard in random.permutation(len(counts))]
    )
    order = np.empty_like(row)
    start = 0
    for stream in range(streams):
        part = row[start : start + len(order[stream::streams])]
        for first in range(0, len(part), window):
            random.shuffle(part[first : first + window])
        order[stream::streams] = part
        start += len(part)
    return order


class TrainBatches(Sampler[list[Draw]]):
    """Shuffled batches of full size, starting anywhere in any epoch.

    The global batch number b of an epoch is always the same set of draws; `world` processes share it. So neither
    resuming in the middle of an epoch nor another number of processes at the same global batch changes what is
    trained on. With `repeats` = r each image is drawn r times in succession, differently augmented, out of n / r images
    in an epoch (repeated augmentation, Hoffer et al., 2020).

    Args:
        size: number of images.
        batch_size: images per process and batch.
        position: called when iteration starts; returns the epoch and the number of its batches already done.
        epoch_order: of (seed, epoch), the indices in the order of that epoch; by default any after any other.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        position: Callable[[], tuple[int, int]],
        *,
        seed: int = 0,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        epoch_order: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        self.epoch_order = epoch_order or functools.partial(shuffled, size)
        self.size, self.batch_size, self.position = size, batch_size, position
        self.seed, self.repeats, self.rank, self.world = seed, repeats, rank, world

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, done = self.position()
        order = np.repeat(self.epoch_order(self.seed, epoch), self.repeats)[: self.size]
        global_batch = self.batch_size * self.world
        for batch in range(done, len(self)):
            places = range(batch * global_batch + self.rank, (batch + 1) * global_batch, self.world)
            yield [Draw(int(order[place]), derive_seed(SAMPLE, self.seed, epoch, place)) for place in places]


class EvalBatches(Sampler[list[Draw]]):
    """Every image once, in order, dealt to `world` processes.

    All processes get the same number of draws, as collectives inside a sharded model need; what fills up the
    last ones is marked as not counted.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world

    @property
    def draws(self) -> int:
        """Draws of each process."""
        return -(-self.size // self.world)

    def __len__(self) -> int:
        return -(-self.draws // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        for start in range(0, self.draws, self.batch_size):
            places = (self.rank + self.world * i for i in range(start, min(start + self.batch_size, self.draws)))
            yield [Draw(min(place, self.size - 1), place, place < self.size) for place in places]
