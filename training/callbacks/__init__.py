"""What happens around the training step: averaging, checkpoints, progress, refusing what is not finite."""

from training.callbacks.checkpoint import RunCheckpoint
from training.callbacks.ema import WeightAverage
from training.callbacks.finite import FiniteLoss
from training.callbacks.progress import Progress

__all__ = ["FiniteLoss", "Progress", "RunCheckpoint", "WeightAverage"]
