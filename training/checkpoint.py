"""What a checkpoint carries besides Lightning's own state, and how a run is found and rebuilt from one.

    state_dict         the model's weights, each key with the prefix `model.`
    ema_state_dict     their average under the model's bare keys, where the run keeps one
    fastna             {"format", "model": {"name", "kwargs"}, "classes", "config"}: plain containers only

Every file is read with `weights_only=True`: one from a stranger cannot run code.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from training.config import DataConfig, TrainConfig, data_from_plain
from training.errors import CheckpointError, one_line

FORMAT = 1
CHANGE_NOTHING = {"workers", "worker_timeout"}  # keys that may differ in a resumed run: it ends with the same bits
LAST, BEST = "last.ckpt", "best.ckpt"
FOLDER = "checkpoints"


def describe_run(config: TrainConfig, model_kwargs: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """What travels with every checkpoint of a run, so that the model can be rebuilt from the file alone."""
    return {
        "format": FORMAT,
        "model": {"name": config.model.name, "kwargs": model_kwargs},
        "classes": list(classes),
        "config": dataclasses.asdict(config),
    }


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with sharded weights (FSDP) gathered; every process must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def load_full_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load whole weights into a model that may be sharded; every process must call it."""
    set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True))


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint read into memory."""

    path: Path
    content: dict[str, Any]

    @property
    def model_name(self) -> str:
        return self.content["fastna"]["model"]["name"]

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return dict(self.content["fastna"]["model"]["kwargs"])

    @property
    def classes(self) -> list[str]:
        return list(self.content["fastna"]["classes"])

    @property
    def config(self) -> dict[str, Any]:
        return self.content["fastna"]["config"]

    @property
    def data(self) -> DataConfig:
        """The data configuration of the run."""
        return data_from_plain(self.config["data"])

    @property
    def best_value(self) -> float | None:
        """The highest validation top-1 (of the average, where there is one) up to this checkpoint."""
        states = self.content.get("callbacks", {})
        return next((state["best_value"] for name, state in states.items() if "RunCheckpoint" in name), None)

    def weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """The model's state dict under its bare keys: the average where there is one and it is wanted."""
        if averaged and "ema_state_dict" in self.content:
            return self.content["ema_state_dict"]
        saved = self.content["state_dict"]
        return {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}


def read_run(path: str | Path) -> SavedRun:
    """Read a checkpoint that train.py wrote.

    Raises:
        CheckpointError: it is not there, is damaged, or was written by something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    bare = CheckpointError(
        f"{path} is not a checkpoint of train.py: it does not say which model it holds; bare weights need it said:"
        " --model NAME, model_name=NAME for eval.py, model=NAME model.checkpoint=PATH for train.py"
    )
    if path.suffix == ".safetensors":
        raise bare
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in zipfile, pickle or torch, in many ways
        reason = one_line(str(error)).split(". ")[0]
        raise CheckpointError(f"cannot read checkpoint {path}: {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict) or not {"fastna", "state_dict"} <= content.keys():
        raise bare
    if content["fastna"].get("format") != FORMAT:
        found = content["fastna"].get("format")
        raise CheckpointError(f"{path}: checkpoint format {found!r}; this version reads format {FORMAT}")
    return SavedRun(path, content)


def trained_classes(path: str | Path) -> list[str] | None:
    """The class names of a checkpoint that train.py wrote; None for a file of bare weights, which has none."""
    if Path(path).suffix != ".ckpt":
        return None
    try:
        return read_run(path).classes
    except CheckpointError:
        return None


def newest_checkpoint(folder: Path) -> Path:
    """The newest `last.ckpt` of any run under `folder`.

    Raises:
        CheckpointError: there is none.
    """
    found = [path for path in folder.rglob(LAST) if path.parent.name == FOLDER]
    if not found:
        raise CheckpointError(f"resume=last: there is no {FOLDER}/{LAST} under {folder}")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def check_resumable(saved: SavedRun, description: dict[str, Any]) -> list[str]:
    """What makes a resumed run differ from one that was never interrupted, as sentences.

    Raises:
        CheckpointError: the checkpoint holds another model or other classes.
    """
    for key in ("name", "kwargs"):
        theirs, ours = saved.content["fastna"]["model"][key], description["model"][key]
        if theirs != ours:
            raise CheckpointError(f"{saved.path} holds a model with {key} {theirs!r}, but this run has {ours!r}")
    if saved.classes != description["classes"]:
        raise CheckpointError(f"{saved.path} was trained on other classes than this run's data has")
    differences = []
    for group in ("seed", "data", "augmentation", "optimizer", "schedule"):
        theirs, ours = saved.config.get(group), description["config"][group]
        if not isinstance(ours, dict):
            theirs, ours, prefix = {group: theirs}, {group: ours}, ""
        else:
            theirs, prefix = theirs or {}, f"{group}."
        for key in sorted((ours.keys() | theirs.keys()) - CHANGE_NOTHING):
            if theirs.get(key) != ours.get(key):
                differences.append(f"{prefix}{key} was {theirs.get(key)!r} and is now {ours.get(key)!r}")
    return differences
