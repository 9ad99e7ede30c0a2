"""Runs of the real entry points in processes of their own, and the short training run that many tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Two epochs of ten updates with all that draws random numbers: affine moves, erasing, mixup, cutmix, drop path.
SHORT = [
    "experiment=digits",
    "data.train_limit=160",
    "data.batch_size=16",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "augmentation.mixup=0.8",
    "augmentation.cutmix=1.0",
    "augmentation.reprob=0.25",
    "model.drop_path_rate=0.2",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_steps=1",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run an entry point from the repository's root to its end."""
    done = subprocess.run(command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    if check and done.returncode:
        pytest.fail(f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done
