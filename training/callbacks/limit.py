"""Ends a run after trainer.max_steps updates, wherever in an epoch that is."""

from lightning.pytorch import Callback, Trainer

from training.module import Classifier


class StepLimit(Callback):
    """Sets Lightning's own limit, but only once training has started.

    With the limit set earlier, Lightning takes a checkpoint from the end of an epoch for one from within it, and the
    resumed run leaves out the next epoch.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: Trainer, module: Classifier) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
