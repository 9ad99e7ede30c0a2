"""One Lightning data module for every data set that is a list of images."""

import logging
from contextlib import AbstractContextManager

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from training.config import AugmentationConfig, DataConfig
from training.data.augment import DeviceAugmentation
from training.data.images import (
    Batch,
    ImageReader,
    PixelBatch,
    PixelReader,
    Selection,
    Splits,
    collate,
    collate_pixels,
)
from training.data.sampling import EvalBatches, TrainBatches
from training.data.transforms import eval_transform, train_transform
from training.data.workers import LazyLoader, dead_workers_named
from training.errors import DataError

log = logging.getLogger(__name__)


class ImageData(LightningDataModule):
    """Serves `splits` as `Batch`es.

    Args:
        splits: what `open_splits` returned.
        config: batch size, workers and preprocessing.
        augmentation: of the training images; None where only evaluation is needed.
        seed: of the order and the augmentation.
    """

    def __init__(
        self, splits: Splits, config: DataConfig, augmentation: AugmentationConfig | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.splits, self.config, self.augmentation, self.seed = splits, config, augmentation, seed
        self.broken: set[str] = set()
        self.loaders: list[LazyLoader] = []
        self.test_split = "test"
        on_device = augmentation is not None and augmentation.runs_on == "device"
        self.device_augmentation = DeviceAugmentation(config, augmentation) if on_device else None

    def reader(self, split: str) -> ImageReader:
        """The images of a split as evaluation reads them."""
        return ImageReader(getattr(self.splits, split), eval_transform(self.config), self.config.in_chans)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches from wherever the trainer's loop stands.

        Raises:
            DataError: there are fewer images than one global batch.
        """
        config, augmentation = self.config, self.augmentation
        if augmentation is None:
            raise RuntimeError("this data module was built for evaluation: it has no augmentation")
        images, size = self.splits.train, len(self.splits.train.targets)
        if config.train_limit is not None and config.train_limit < size:
            size = config.train_limit
            images = Selection(images, np.random.RandomState(0).permutation(len(images.targets))[:size].tolist())
        rank, world = self._rank_and_world()
        if size < config.batch_size * world:
            raise DataError(
                f"{size} training images make no batch of {config.batch_size} x {world} processes:"
                f" set data.batch_size to {size // world} or less"
            )
        if self.device_augmentation is not None:
            reader: ImageReader = PixelReader(images, config.in_chans)
        else:
            reader = ImageReader(images, train_transform(config, augmentation), config.in_chans)
        batches = TrainBatches(
            size,
            config.batch_size,
            self._position,
            seed=self.seed,
            repeats=augmentation.repeats,
            rank=rank,
            world=world,
            epoch_order=getattr(images, "epoch_order", None),
        )
        return self._loader(reader, batches)

    def val_dataloader(self) -> DataLoader:
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.test_split)

    def eval_dataloader(self, split: str) -> DataLoader:
        """Every image of a split exactly once over all processes."""
        reader = self.reader(split)
        rank, world = self._rank_and_world()
        size = self.config.eval_batch_size or self.config.batch_size
        return self._loader(reader, EvalBatches(len(reader), size, rank=rank, world=world))

    def on_before_batch_transfer(self, batch: Batch | PixelBatch, dataloader_idx: int) -> Batch | PixelBatch:
        """Name and count the images that could not be read; one read again in another epoch counts once.

        Raises:
            DataError: more than data.broken_image_limit of them, or a whole shard is missing or broken.
        """
        limit = self.config.broken_image_limit
        for label, reason, fatal in batch.broken:
            if fatal:
                raise DataError(reason)
            if label in self.broken:
                continue
            self.broken.add(label)
            if len(self.broken) > limit:
                raise DataError(f"cannot read image {label}: {reason} (data.broken_image_limit={limit})")
            log.warning("skipped unreadable image %s: %s (%d of %d)", label, reason, len(self.broken), limit)
        return batch._replace(broken=())

    def on_after_batch_transfer(self, batch: Batch | PixelBatch, dataloader_idx: int) -> Batch:
        """Augment on the device what the workers left as it was."""
        if isinstance(batch, PixelBatch):
            if self.device_augmentation is None:
                raise RuntimeError("only this module's own training loader makes batches of pixels")
            return self.device_augmentation(batch)
        return batch

    def dead_workers_named(self) -> AbstractContextManager[None]:
        """Within it, a data worker that dies is a DataError which names the worker and the image it read."""
        return dead_workers_named(self.loaders)

    def _loader(self, reader: ImageReader, batches: TrainBatches | EvalBatches) -> LazyLoader:
        loader = LazyLoader(
            reader,
            batch_sampler=batches,
            collate_fn=collate_pixels if isinstance(reader, PixelReader) else collate,
            num_workers=self.config.workers,
            timeout=self.config.worker_timeout if self.config.workers else 0,
            persistent_workers=self.config.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.loaders.append(loader)
        return loader

    def _position(self) -> tuple[int, int]:
        """Epoch and batches of it already done, as the trainer's loop counts them."""
        if self.trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
