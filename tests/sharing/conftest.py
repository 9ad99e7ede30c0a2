"""A tiny model trained by train.py on real digits, and digits as image files."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sharing_runs import run
from sklearn.datasets import load_digits


def save_digits(folder: Path, count: int) -> None:
    """The first `count` digits as `folder`/DIGIT/NUMBER.png."""
    digits = load_digits()
    for number in range(count):
        path = folder / str(digits.target[number]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with averaged weights; evaluated."""
    folder = tmp_path_factory.mktemp("sharing") / "run"
    run(
        "train.py",
        "experiment=digits",
        "schedule.epochs=2",
        "schedule.warmup_epochs=1",
        "data.train_limit=384",
        "model.kwargs.depths=[1,2,1]",
        "callbacks.report.enabled=false",
        f"output_dir={folder}",
    )
    return folder


@pytest.fixture(scope="session")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in timm's format."""
    folder = tmp_path_factory.mktemp("exported") / "digits"
    run("scripts/export.py", checkpoint, "--output", folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits in class folders, and a broken file among them."""
    folder = tmp_path_factory.mktemp("pictures")
    save_digits(folder, 40)
    whole = (folder / "0" / "0000.png").read_bytes()
    (folder / "3" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "3" / "noise.png").write_bytes(random.Random(0).randbytes(500))
    return folder
