"""Randomness as a function of position, not of history.

Every random number of a run derives from (seed, what it is for, where it is used): the order of an epoch from
(seed, epoch), an image's augmentation from (seed, epoch, place in that order), mixup and drop path from
(seed, epoch, batch, rank). A run that is killed and resumed, or that has another number of data workers, therefore
draws the same numbers without any generator's state being saved.
"""

import random

import numpy as np
import torch

ORDER, SAMPLE, STEP, INIT = range(4)  # what a seed is for


def derive_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every part and on their order."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices), from which timm draws."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
