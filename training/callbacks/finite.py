"""Refuses to go on, or to save, once the loss or a weight is not finite."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from training.errors import TrainingError
from training.module import Classifier


class FiniteLoss(Callback):
    """Looks at each loss one batch later, when the device has long computed it, so that looking does not hold it up."""

    def __init__(self) -> None:
        self._pending: tuple[str, Tensor] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check(module)
        if outputs is not None:
            place = f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx})"
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self._pending = (place, loss.detach())

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        self._check(module)

    def on_save_checkpoint(self, trainer: Trainer, module: Classifier, checkpoint: dict[str, Any]) -> None:
        """A checkpoint with a weight that is not finite never replaces a good one."""
        self._check(module)
        name = first_not_finite(module.model)
        if name is not None:
            raise TrainingError(
                f"weight {name} is not finite at step {trainer.global_step}; the last checkpoint is kept"
            )

    def _check(self, module: Classifier) -> None:
        if self._pending is None:
            return
        place, loss = self._pending
        self._pending = None
        if not torch.isfinite(loss).all():
            name = first_not_finite(module.model)
            tensor = f"the first bad tensor is weight {name}" if name else "all weights are still finite"
            raise TrainingError(
                f"the loss is {loss.mean().item()} at {place}; {tensor}; the last checkpoint is kept:"
                " lower optimizer.lr, set optimizer.clip_grad_norm, or use trainer.precision=bf16-mixed"
            )


def first_not_finite(model: torch.nn.Module) -> str | None:
    """Name of the first parameter with a value that is not finite."""
    return next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
