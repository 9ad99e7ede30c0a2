"""The exponential moving average of the weights, by timm, with its own evaluation."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from timm.utils import ModelEmaV3

from training.checkpoint import full_state_dict, load_full_state_dict
from training.config import EmaConfig
from training.data import Batch
from training.module import Classifier, EvalMetrics


class WeightAverage(Callback):
    """Updates the average with every update of the weights; logs val_ema/*; keeps it in checkpoints under bare keys."""

    def __init__(self, config: EmaConfig) -> None:
        self.config = config
        self.average: ModelEmaV3 | None = None
        self.metrics: EvalMetrics | None = None
        self._restored: dict[str, Any] | None = None
        self._updates = 0

    def on_fit_start(self, trainer: Trainer, module: Classifier) -> None:
        self.average = ModelEmaV3(module.model, decay=self.config.decay, use_warmup=self.config.warmup)
        self.metrics = EvalMetrics(len(module.classes)).to(module.device)
        if self._restored is not None:
            load_full_state_dict(self.average.module, self._restored)
        self._updates = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Average once per update, not once per accumulated batch."""
        step = trainer.global_step
        if self.average is not None and step != self._updates and step % self.config.every_n_steps == 0:
            self.average.update(module.model, step=step)
        self._updates = step

    def on_validation_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.average is None or self.metrics is None:
            return
        if len(batch.target):
            self.metrics.update(module.classify(self.average.module, batch.image), batch.target)

    def on_validation_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        if self.metrics is None:
            return
        for name, metric in self.metrics.items().items():
            module.log(f"val_ema/{name}", metric.compute())
            metric.reset()

    def on_save_checkpoint(self, trainer: Trainer, module: Classifier, checkpoint: dict[str, Any]) -> None:
        if self.average is not None:
            checkpoint["ema_state_dict"] = full_state_dict(self.average.module)

    def on_load_checkpoint(self, trainer: Trainer, module: Classifier, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("ema_state_dict")
