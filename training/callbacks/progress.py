"""Progress with images/s: a live bar on a terminal, one line per epoch elsewhere."""

import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from training.module import Classifier


class Progress(Callback):
    """Logs images_per_second (all processes together) and shows it. The live bar covers the whole run, for its ETA.

    Args:
        live: whether to draw a bar; a line per epoch otherwise.
        scaling: printed once, when training starts.
    """

    def __init__(self, live: bool) -> None:
        self.console = Console()
        self.bars: Bars | None = None
        self.live = live
        self._started = 0.0
        self._images = 0

    def on_train_start(self, trainer: Trainer, module: Classifier) -> None:
        if not (self.live and trainer.is_global_zero):
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Bars(*columns, TextColumn("{task.fields[figures]}"), console=self.console)
        batches = int(trainer.num_training_batches)
        total = batches * (trainer.max_epochs or 1)
        done = batches * trainer.current_epoch
        self._task = self.bars.add_task("training", total=total, completed=done, figures="")
        self.bars.start()

    def on_train_epoch_start(self, trainer: Trainer, module: Classifier) -> None:
        self._started, self._images = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch.target) * trainer.world_size
        if self.bars is not None:
            figures = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {self._rate():,.0f} images/s"
            self.bars.update(self._task, advance=1, figures=figures)

    def on_validation_start(self, trainer: Trainer, module: Classifier) -> None:
        """Training's rate leaves validation out."""
        if not trainer.sanity_checking and self._images:
            module.log("images_per_second", self._rate())

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        shown = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        for key in ("train/loss_epoch", "val/loss", "val/top1", "val_ema/top1"):
            if key in metrics:
                shown.append(f"{key.removesuffix('_epoch')} {float(metrics[key]):.4f}")
        if "images_per_second" in metrics:
            shown.append(f"{float(metrics['images_per_second']):,.0f} images/s")
        self.console.print("  ".join(shown), highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: Classifier, exception: BaseException) -> None:
        self._stop()

    def _rate(self) -> float:
        return self._images / max(time.monotonic() - self._started, 1e-9)

    def _stop(self) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None
