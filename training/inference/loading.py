"""A model ready to answer, from whatever holds one.

    PATH.ckpt                  what train.py wrote: architecture, classes and preprocessing travel inside
    FOLDER, local-dir:FOLDER   what scripts/export.py wrote, or anything else in timm's format
    hf-hub:USER/NAME           the same, on the Hugging Face hub
    NAME                       a model of the zoo, with its published weights
    PATH with architecture     bare weights, such as a published file: .pth, .bin, .safetensors

Nothing in a file is ever run: pickles are read with `weights_only=True`, and a file can name registered models only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn

import models
from models.checkpoints import native_state_dict
from training.build import create_model
from training.checkpoint import BEST, FOLDER, SavedRun, read_run
from training.config import DataConfig
from training.errors import CheckpointError, ConfigError, one_line

SOURCES = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what travels with it.

    `classes` are in the order of the outputs. `preprocessing` is used for size, channels, crop and normalisation only.
    """

    source: str
    model: nn.Module
    name: str
    arguments: dict[str, Any]
    classes: list[str]
    preprocessing: DataConfig
    run: SavedRun | None = None

    def readable(self, index: int) -> str:
        """A class as a person calls it: ImageNet's synsets by their first word."""
        name = self.classes[index]
        return _LEMMAS.get(name, name).split(",")[0]


_LEMMAS: dict[str, str] = ImageNetInfo().label_descriptions(as_dict=True)


def imagenet_classes() -> list[str]:
    """ImageNet-1k's synsets in the order of every published model's outputs."""
    return list(ImageNetInfo().label_names())


def load_model(source: str, architecture: str | None = None, averaged: bool = True) -> Loaded:
    """Build the model that `source` holds (see the head of this file) and load its weights.

    Args:
        architecture: of a file of bare weights, a timm model's name.
        averaged: take the averaged weights of a checkpoint that has them.

    Raises:
        CheckpointError: the source cannot be read, does not fit, or holds more than data.
        ConfigError: it names a model that does not exist.
    """
    path = Path(source).expanduser()
    if architecture is not None:
        loaded = _bare_weights(path, architecture)
    elif source.startswith(SOURCES) or path.is_dir():
        loaded = _timm_format(source if source.startswith(SOURCES) else f"local-dir:{path}")
    elif path.exists() or path.suffix:
        loaded = _own_checkpoint(path, averaged)
    else:
        loaded = _published(source)
    loaded.model.eval().requires_grad_(False)
    if loaded.model.num_classes != len(loaded.classes):
        raise CheckpointError(f"{source}: {len(loaded.classes)} class names for {loaded.model.num_classes} outputs")
    return loaded


def _own_checkpoint(path: Path, averaged: bool) -> Loaded:
    saved = read_run(path)
    try:
        name, arguments, classes, data = saved.model_name, saved.model_kwargs, saved.classes, saved.data
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the run is damaged: {error!r}") from error
    model = create_model(name, arguments)
    try:
        model.load_state_dict(saved.weights(averaged))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {name}: {one_line(str(error))}") from error
    return Loaded(str(path), model, name, arguments, classes, data, saved)


def _bare_weights(path: Path, architecture: str) -> Loaded:
    """The file decides how many classes and channels the model has."""
    try:
        weights, _ = models.read_checkpoint(path)
        weights = native_state_dict(weights)
        config = timm.get_pretrained_cfg(architecture, allow_unregistered=True) if timm.is_model(architecture) else None
        arguments: dict[str, Any] = {}
        if config is not None:
            head, first = (weights.get(f"{getattr(config, key)}.weight") for key in ("classifier", "first_conv"))
            if head is not None:
                arguments["num_classes"] = len(head)
            if first is not None:
                arguments["in_chans"] = first.shape[1]
        model = create_model(architecture, arguments)
        models.load_checkpoint(model, path)
    except models.CheckpointError as error:
        raise CheckpointError(error) from error
    return _from_timm(str(path), model, architecture, arguments)


def _timm_format(source: str) -> Loaded:
    try:
        model = timm.create_model(source, pretrained=True)
    except Exception as error:  # a damaged file or folder fails in json, pickle, safetensors, torch or timm
        reason = one_line(str(error)).split(". ")[0]
        best = Path(source.removeprefix(SOURCES[0])) / FOLDER / BEST
        hint = f"; did you mean {best}?" if best.is_file() else ""
        raise CheckpointError(f"cannot load {source}: {type(error).__name__}: {reason}{hint}") from error
    return _from_timm(source, model, model.pretrained_cfg["architecture"], dict(getattr(model, "_model_args", {})))


def _published(name: str) -> Loaded:
    try:
        model = create_model(name, {}, pretrained=True)
    except ConfigError as error:
        if timm.is_model(name):
            raise
        raise ConfigError(f"{error}, and there is no file or folder {name}") from error
    return _from_timm(name, model, name.split(".")[0], {})


def _from_timm(source: str, model: nn.Module, name: str, arguments: dict[str, Any]) -> Loaded:
    classes = list(model.pretrained_cfg.get("label_names") or ())
    if not classes:
        synsets = imagenet_classes()
        classes = synsets if model.num_classes == len(synsets) else [str(i) for i in range(model.num_classes)]
    return Loaded(source, model, name, arguments, classes, preprocessing_of(model, arguments.get("in_chans")))


def preprocessing_of(model: nn.Module, in_chans: int | None) -> DataConfig:
    """timm's data configuration of a model, in this project's words; a mean over RGB serves a grey model."""
    data = resolve_model_data_config(model)
    channels, _, width = data["input_size"]
    channels = channels if in_chans is None else in_chans
    mean, std = (
        list(values) if len(values) == channels else [sum(values) / len(values)] * channels
        for values in (data["mean"], data["std"])
    )
    return DataConfig(
        name="inference",
        image_size=width,
        in_chans=channels,
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        mean=mean,
        std=std,
    )
