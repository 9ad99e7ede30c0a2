"""Reading weights from wherever they lie, and fitting them to a model.

Formats: the original files (`.pth`, a bare state dict), Hugging Face's (`pytorch_model.bin`, `model.safetensors`; other
names, query, key and value apart) and this project's own (`.ckpt`, Lightning's, with averaged weights when there are).
Nothing that a file says is ever run: pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from models.layers import resample_rpb

logger = logging.getLogger(__name__)

MAX_KEYS_NAMED = 50


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model. One line; the keys in full are in
    `missing`, `unexpected` and `mismatched`."""

    def __init__(
        self,
        message: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did: which weights it read, what it changed to make them fit, and which parameters keep
    their fresh initialisation because the file has none that fit."""

    path: Path
    weights: str
    changed: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"loaded the {self.weights} of {self.path}", *self.changed]
        if self.reinitialised:
            lines.append(f"left at their initialisation: {', '.join(self.reinitialised)}")
        return "; ".join(lines)


def load_checkpoint(model: nn.Module, path: str | PathLike[str]) -> LoadReport:
    """Load the weights in the file `path` into `model`, converted and fitted.

    Fitted: a head of another class count is left re-initialised, the first convolution is adapted to other `in_chans`
    as timm does, biases by position are resampled to another window bicubically. Nothing else may differ. The model is
    untouched when an error is raised. Names in messages are this project's, which are the original files'.

    Raises CheckpointError when the file is absent, unreadable, or holds keys or shapes that are not the model's.
    """
    path = Path(path)
    state_dict, weights = read_checkpoint(path)
    target = _unwrap(model)
    fitted, report = _fit(native_state_dict(state_dict), target)
    _check(fitted, report, target, path)
    target.load_state_dict(fitted, strict=False)
    result = LoadReport(path, weights, tuple(report.changed), tuple(report.reinitialised))
    logger.info("%s", result)
    return result


def read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file, under the names it has there, and which it is: "weights" or "averaged weights".

    Raises CheckpointError when the file is absent, unreadable, or holds no state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; name the file of weights in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path, device="cpu")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in whatever way its bytes happen to say
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: not a readable checkpoint, or one that holds more than tensors and plain containers "
            f"({type(error).__name__}: {reason[0] if reason else 'no further reason'})"
        ) from error
    weights = "weights"
    if isinstance(content, Mapping):
        for key in ("ema_state_dict", "state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                weights = "averaged weights" if key == "ema_state_dict" else weights
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no state dict but {_describe(content)}")
    strangers = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{path}: holds no state dict: {', '.join(strangers[:5])} are no tensors")
    return {str(key): value for key, value in content.items()}, weights


def _describe(content: Any) -> str:
    return "an empty mapping" if isinstance(content, Mapping) else f"a {type(content).__name__}"


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and timm's feature wrappers."""
    model = getattr(model, "_orig_mod", model)
    inner = model.model if isinstance(model, FeatureGetterNet) else model
    assert isinstance(inner, nn.Module)
    return inner


# Names.

_HF_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^encoder\.levels\.(\d+)\.downsample\.", r"levels.\1.downsample."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def native_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` under this project's names, which are the original files': wrappers' prefixes gone, Hugging Face's
    names translated, buffers that follow from the rest left out."""
    named = {_strip(key): value for key, value in state_dict.items()}
    if any(key.startswith("model.") for key in named):
        named = {_strip(key.removeprefix("model.")): value for key, value in named.items() if key.startswith("model.")}
    if any(re.match(r"((di)?nat\.)?(encoder|embeddings)\.", key) for key in named):
        named = _from_hugging_face(named)
    return {key: value for key, value in named.items() if not key.endswith("attn.relative_position_index")}


def _strip(key: str) -> str:
    return key.removeprefix("module.").replace("_orig_mod.", "")


def _from_hugging_face(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state_dict.items():
        key = re.sub(r"^(di)?nat\.", "", key)
        for pattern, replacement in _HF_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    native: dict[str, Tensor] = {}
    for key, value in renamed.items():
        block, _, leaf = key.rpartition(".")
        if leaf == "layer_scale_parameters" and len(value) == 2:
            native[f"{block}.gamma1"], native[f"{block}.gamma2"] = value.unbind(0)
        elif block.endswith((".attn.query", ".attn.key", ".attn.value")):
            attention = block.rpartition(".")[0]
            rows = [renamed.get(f"{attention}.{part}.{leaf}") for part in ("query", "key", "value")]
            fitting = [row for row in rows if row is not None and row.shape == value.shape]
            # A part without its like stays under its own name, to be named as unexpected.
            native |= {f"{attention}.qkv.{leaf}": torch.cat(fitting)} if len(fitting) == 3 else {key: value}
        else:
            native[key] = value
    return native


# Shapes.


@dataclass
class _Fit:
    changed: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """The first convolution `[dim, in_chans, height, width]` for another number of channels, as timm does from three:
    one channel gets the sum over all; more take turns with the file's, scaled so that a grey image looks the same."""
    have = weight.shape[1]
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    return weight[:, torch.arange(channels) % have] * (have / channels)


def _names(model: nn.Module) -> tuple[str, str | None]:
    """The model's classifier and its first convolution."""
    config = getattr(model, "pretrained_cfg", None) or {}
    first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    return config.get("classifier") or "head", first


def _fit(state_dict: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], _Fit]:
    """`state_dict` with what may differ from the model made to fit, and what was done."""
    wanted = model.state_dict()
    classifier, first_conv = _names(model)
    headless = not any(key.startswith(f"{classifier}.") for key in wanted)
    # A backbone that gives features only has no last norm, and no level behind its last feature.
    pruned = headless and isinstance(getattr(model, "norm", None), nn.Identity)
    left_out = (f"{classifier}.", "norm.", "levels.", "layers.") if pruned else (f"{classifier}.",)
    fitted: dict[str, Tensor] = {}
    report = _Fit()
    classes = state_dict.get(f"{classifier}.weight")
    ours = wanted.get(f"{classifier}.weight")
    other_head = classes is not None and ours is not None and len(classes) != len(ours)
    for key, value in state_dict.items():
        like = wanted.get(key)
        if like is None:
            if not (headless and key.startswith(left_out)):
                fitted[key] = value
        elif other_head and key.startswith(f"{classifier}."):
            report.reinitialised.append(key)
        elif value.shape == like.shape:
            fitted[key] = value
        elif key == f"{first_conv}.weight" and value.ndim == 4 and len(value) == len(like):
            fitted[key] = adapt_channels(value, like.shape[1])
            report.changed.append(f"{key}: {value.shape[1]} -> {like.shape[1]} channels")
        elif key.endswith(".rpb") and value.ndim == like.ndim and len(value) == len(like):
            fitted[key] = resample_rpb(value, like.shape[1:])
            report.changed.append(f"{key}: {tuple(value.shape[1:])} -> {tuple(like.shape[1:])} offsets")
        else:
            fitted[key] = value
    if other_head and classes is not None and ours is not None:
        report.changed.append(f"{classifier}: the file has {len(classes)} classes, the model {len(ours)}")
    return fitted, report


def _check(fitted: Mapping[str, Tensor], report: _Fit, model: nn.Module, path: Path) -> None:
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in fitted and key not in report.reinitialised]
    unexpected = [key for key in fitted if key not in wanted]
    mismatched = [
        f"{key} {tuple(value.shape)} where the model has {tuple(wanted[key].shape)}"
        for key, value in fitted.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    complaints = [
        f"{len(keys)} {kind}: {_listed(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", mismatched))
        if keys
    ]
    if complaints:
        raise CheckpointError(
            f"{path}: is no checkpoint of this {type(model).__name__}; keys {'; '.join(complaints)}",
            missing,
            unexpected,
            mismatched,
        )


def _listed(keys: list[str]) -> str:
    more = len(keys) - MAX_KEYS_NAMED
    return ", ".join(keys) if more <= 0 else f"{', '.join(keys[:MAX_KEYS_NAMED])} and {more} more"


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What timm calls on published weights before it loads them: names and windows made the model's.

    timm itself adapts `in_chans` and drops the head for another class count. A file decides how many classes it has: a
    head asked for with the published count takes the file's.
    """
    native = native_state_dict(state_dict)
    wanted = model.state_dict()
    published_classes = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    head = native.get("head.weight")
    if head is not None and getattr(model, "num_classes", None) == published_classes != len(head):
        model.reset_classifier(len(head))  # type: ignore[operator]
    return {
        key: resample_rpb(value, wanted[key].shape[1:])
        if key.endswith(".rpb") and key in wanted and value.shape[1:] != wanted[key].shape[1:]
        else value
        for key, value in native.items()
    }
