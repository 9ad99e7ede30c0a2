"""What happens around the training step: averaging, checkpoints, limits, progress, refusing what is not finite."""

from training.callbacks.checkpoint import RunCheckpoint
from training.callbacks.ema import WeightAverage
from training.callbacks.finite import FiniteLoss
from training.callbacks.limit import StepLimit
from training.callbacks.progress import Progress

__all__ = ["FiniteLoss", "Progress", "RunCheckpoint", "StepLimit", "WeightAverage"]
