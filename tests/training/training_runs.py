"""Runs of the real entry points in processes of their own, and the short training run that many tests share."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import training.cli
from training.config import EvalConfig, TrainConfig, to_object

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


def kill_at_step(arguments: list[str], folder: Path, step: int, total: int) -> int:
    """Start a training run of `total` updates in `folder` and kill it once its last checkpoint has reached `step`.

    Returns the step it has. A run that on a busy machine is through before anyone looks is started again.
    """
    last = folder / "checkpoints" / "last.ckpt"
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            command("train.py", *arguments, f"output_dir={folder}"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        try:
            while process.poll() is None:
                if last.exists() and torch.load(last, weights_only=True)["global_step"] >= step:
                    break
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        reached = torch.load(last, weights_only=True)["global_step"]
        if reached < total:
            return reached
    raise AssertionError(f"the run always ended before it could be killed at step {step}")


def start(entry: str, *arguments: str) -> None:
    """What `python ENTRY.py ...` does, in this process, which has imported everything already."""
    from training.run import evaluate, train

    schema, function = {"train": (TrainConfig, train), "eval": (EvalConfig, evaluate)}[entry]
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{entry}.py", *arguments])
        patch.chdir(ROOT)
        training.cli.run_command(entry, lambda config: function(to_object(config, schema)))


def draw_classes(root: Path, side: int = 24) -> Path:
    """Two class folders of eight small pictures, dark and light; returns `root`."""
    random = np.random.RandomState(0)
    for name, level in (("dark", 40), ("light", 200)):
        (root / name).mkdir(parents=True)
        for index in range(8):
            pixels = (level + random.randint(0, 40, (side, side, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root
