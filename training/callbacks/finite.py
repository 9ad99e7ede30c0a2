"""Refuses to go on, or to save, once the loss or a weight is not finite, and says where it began."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from training.data import Batch
from training.errors import TrainingError
from training.module import Classifier

FIXES = "lower optimizer.lr, set optimizer.clip_grad_norm, or use trainer.precision=bf16-mixed"


class FiniteLoss(Callback):
    """Looks at each loss before it can reach a weight.

    The look costs a device nothing but a wait for the forward pass: the loss is copied away behind it, and waited
    for once the backward pass is queued.
    """

    def __init__(self) -> None:
        self._batch: tuple[int, Batch] | None = None
        self._loss: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def on_train_batch_start(self, trainer: Trainer, module: Classifier, batch: Batch, batch_idx: int) -> None:
        self._batch = (batch_idx, batch)

    def on_before_backward(self, trainer: Trainer, module: Classifier, loss: Tensor) -> None:
        self._loss = loss.detach().to("cpu", non_blocking=True)
        self._copied = None
        if loss.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def on_after_backward(self, trainer: Trainer, module: Classifier) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        if self._loss is None or self._batch is None or torch.isfinite(self._loss).all():
            return
        index, batch = self._batch
        culprit = first_bad_tensor(module, batch.image)
        raise TrainingError(
            f"the loss is {self._loss.mean().item()} at step {trainer.global_step} (epoch {trainer.current_epoch},"
            f" batch {index}); the first bad tensor is {culprit}; the last checkpoint is kept: {FIXES}"
        )

    def on_save_checkpoint(self, trainer: Trainer, module: Classifier, checkpoint: dict[str, Any]) -> None:
        """A checkpoint with a weight that is not finite never replaces a good one."""
        name = first_bad_weight(module.model)
        if name is not None:
            step = trainer.global_step
            raise TrainingError(f"weight {name} is not finite at step {step}; the last checkpoint is kept: {FIXES}")


def first_bad_weight(model: nn.Module) -> str | None:
    """Name of the first parameter with a value that is not finite."""
    return next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)


def first_bad_tensor(module: Classifier, image: Tensor) -> str:
    """In words: the input, the first weight, or the first submodule's output that is not finite, in that order.

    Runs the model once more, under the trainer's precision; a submodule comes before those that contain it.
    """
    if not torch.isfinite(image).all():
        places = (~torch.isfinite(image)).flatten(1).any(1).nonzero().flatten().tolist()
        return f"the input (image {places[0]} of the batch)"
    weight = first_bad_weight(module.model)
    if weight is not None:
        return f"weight {weight}"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [part.register_forward_hook(look(name)) for name, part in module.model.named_modules()]
    try:
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            module.classify(module.model, image)
    finally:
        for handle in hooks:
            handle.remove()
    return (
        f"the output of {found[0] or 'the model'}" if found else "the loss itself: every output of the model is finite"
    )
