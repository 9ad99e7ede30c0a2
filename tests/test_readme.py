"""Every command and every piece of Python that the README shows is run as it stands, in a copy of the repository."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python|)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# Appended to a shown command, so that it is short here; of two values for a key the later counts.
SHORT = ["trainer.accelerator=cpu", "data.workers=0"]
SHORT_TRAINING = [*SHORT, "schedule.epochs=1", "schedule.warmup_epochs=0", "data.batch_size=4"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's code, with a folder of real pictures and a file of published layout beside it."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("kernels", "models", "training", "configs", "benchmarks", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval.py", "hubconf.py", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    digits = load_digits()
    for index in range(24):
        target = folder / "photos" / f"digit-{digits.target[index] % 2}" / f"{index:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15).astype("uint8")).resize((64, 64)).convert("RGB").save(target)
    import timm

    import models  # noqa: F401

    torch.save(timm.create_model("nat_mini").state_dict(), folder / "nat_mini.pth")
    return folder


def commands():
    for language, text in BLOCKS:
        if language == "bash":
            yield from (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def test_the_readme_shows_commands_and_code():
    assert len(list(commands())) >= 4
    assert sum(language == "python" for language, _ in BLOCKS) >= 2


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
@pytest.mark.timeout(600)
def test_every_command_runs(copy):
    for command in commands():
        program, *arguments = command.split()
        assert program == "python", f"{command}: the README shows commands of this repository only"
        if arguments[0] == "train.py":
            arguments += SHORT_TRAINING
        elif arguments[0] == "eval.py":
            arguments += SHORT
        done = subprocess.run([sys.executable, *arguments], cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


PYTHON = [text for language, text in BLOCKS if language == "python"]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_every_piece_of_python_runs(copy, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_make_knows_every_target_that_is_shown():
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert {"train", "test", "install", "help"} <= targets
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_the_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text()
    assert report.fill_marked_tables(text, ROOT) == text
