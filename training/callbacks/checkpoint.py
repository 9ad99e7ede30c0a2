"""Checkpoints of a run: the last state, from which it resumes exactly, and the best by validation."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from training.checkpoint import BEST, FOLDER, LAST
from training.config import CheckpointConfig
from training.errors import TrainingError
from training.module import Classifier


class RunCheckpoint(Callback):
    """Writes FOLDER/last.ckpt and FOLDER/best.ckpt, each aside and renamed into place once it is whole.

    A run killed at any moment, or a disk that fills up, leaves the previous file.

    Args:
        folder: of the run.
        monitor: the metric of which a higher value is better.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, monitor: str) -> None:
        self.folder, self.config, self.monitor = folder / FOLDER, config, monitor
        self.best_value: float | None = None
        self._saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every so many updates; and after the last that trainer.max_steps allows, while the epoch still goes on."""
        every, step = self.config.every_n_steps, trainer.global_step
        due = (every is not None and step % every == 0) or step == trainer.max_steps
        if due and step != self._saved_step:
            self._saved_step = step
            self.save(trainer, LAST)

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        """After the epoch's validation. The best is written first: `last` then already knows its value.

        An epoch that trainer.max_steps cut short is not written as one that has ended: it is to be resumed within.
        """
        if not trainer.is_last_batch:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and (self.best_value is None or float(value) > self.best_value):
            self.best_value = float(value)
            self.save(trainer, BEST)
        done = trainer.current_epoch + 1
        if done % self.config.every_n_epochs == 0 or done == trainer.max_epochs:
            self.save(trainer, LAST)

    def save(self, trainer: Trainer, name: str) -> None:
        """Write a checkpoint under `name`; called by every process.

        Raises:
            TrainingError: it cannot be written; what was there before is untouched.
        """
        if trainer.fast_dev_run:
            return
        path, aside = self.folder / name, self.folder / f".{name}.partial"
        try:
            trainer.save_checkpoint(aside)
            if trainer.is_global_zero:
                with aside.open("rb") as written:
                    os.fsync(written.fileno())
                os.replace(aside, path)
        except OSError as error:
            kept = f"the previous {name} is kept whole: make room and go on with resume=last" if path.exists() else ""
            raise TrainingError(
                f"cannot write {path}: {error.strerror or error}; {kept or 'there is none yet'}"
            ) from error
        finally:
            if trainer.is_global_zero:
                aside.unlink(missing_ok=True)
        trainer.strategy.barrier("checkpoint")
