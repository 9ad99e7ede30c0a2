"""Real handwritten digits as PNG and JPEG files, and the same packed into shards and Parquet."""

import os
import sys
from pathlib import Path

import pytest
from data_pictures import pack, write_digits
from hydra.core.global_hydra import GlobalHydra


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/{train,val}/CLASS/NAME.{png,jpg}: 96 and 24 pictures of three classes."""
    root = tmp_path_factory.mktemp("digits") / "photos"
    write_digits(root / "train", 0, 96)
    write_digits(root / "val", 96, 24)
    return root


@pytest.fixture(scope="session")
def packed(photos: Path) -> Path:
    """Four tar shards for training and one for validation."""
    return pack(photos, photos.parent / "packed", "--images-per-shard", "25")


@pytest.fixture(scope="session")
def tables(photos: Path) -> Path:
    return pack(photos, photos.parent / "tables", "--layout", "parquet", "--images-per-shard", "50")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is read from, or left in, the user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")


@pytest.fixture
def train_here(monkeypatch, capsys):
    """Calls train.py's command in this process; returns its exit code, standard output and standard error."""

    def call(*arguments: str, folder: Path | None = None) -> tuple[int, str, str]:
        import training.cli
        from training.config import TrainConfig, to_object
        from training.run import train

        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        if folder is not None:
            monkeypatch.chdir(folder)
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code = 0
        try:
            training.cli.run_command("train", lambda config: train(to_object(config, TrainConfig)))
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
