"""Structured schemas of every configuration group.

Hydra merges the YAML files of configs/ into these, so a misspelt key or a value of a wrong type is refused while the
configuration is composed; `__post_init__` refuses impossible values when `to_object` turns the result into
plain dataclasses. Both happen before a file is written or a data set is opened. No key names a class to be
instantiated: a configuration that somebody else wrote cannot run code.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import timm
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.config_data import (  # noqa: F401  (every schema of configs/ can be imported from here)
    DATA_SCHEMAS,
    INTERPOLATIONS,
    DataConfig,
    DigitsConfig,
    FolderConfig,
    ImageNetConfig,
    ParquetConfig,
    ShardsConfig,
    TimmConfig,
    data_from_plain,
)
from training.errors import ConfigError, one_line
from training.rules import require, require_choice, require_plain_names

CONFIG_DIRECTORY = str(Path(__file__).resolve().parent.parent / "configs")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")
SCHEDULES = ("cosine", "constant", "poly", "step")
DEVICE_RAND_AUGMENT = re.compile(r"rand(-(m|n|mstd|inc)\d+(\.\d+)?)*")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")

Config = TypeVar("Config")


@dataclass
class ModelConfig:
    """Which model, from which weights."""

    name: str = MISSING
    pretrained: bool = False  # fetch the published weights
    checkpoint: str | None = None  # or read them from this file: .pth, .bin, .safetensors, .ckpt
    drop_path_rate: float | None = None  # null: the model's own published rate
    attn_backend: str | None = None  # null: the best backend for each call
    grad_checkpointing: bool = False
    frozen_stages: int = 0  # 1 freezes the stem, 2 also the first level, ...
    linear_probe: bool = False  # train the classifier alone
    head_warmup_epochs: int = 0  # first train the classifier alone for so long, then everything
    widest_dilations: bool = False  # spread each level's window over the whole map of a data.image_size image
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the model, e.g. depths

    def __post_init__(self) -> None:
        rate = self.drop_path_rate
        require(rate is None or 0 <= rate < 1, "model.drop_path_rate", rate, "at least 0 and below 1")
        require(self.frozen_stages >= 0, "model.frozen_stages", self.frozen_stages, "0 or more")
        epochs = self.head_warmup_epochs
        require(epochs >= 0, "model.head_warmup_epochs", epochs, "0 or more")
        require(
            not (epochs and self.linear_probe), "model.head_warmup_epochs", epochs, "0 with model.linear_probe=true"
        )
        chosen = "dilations" in self.kwargs and self.widest_dilations
        require(not chosen, "model.widest_dilations", True, "false where model.kwargs.dilations says them")
        require(
            not (self.pretrained and self.checkpoint),
            "model.checkpoint",
            self.checkpoint,
            "null when model.pretrained=true: the weights can come from one place only",
        )


@dataclass
class AugmentationConfig:
    """Of training images. Names and meanings are timm's, but for `affine_*`, which move small drawings a little."""

    runs_on: str = "workers"  # timm's pipeline in the data workers; device: torchvision's, where the model is
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # [1, 1]: no crop
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    interpolation: str = "random"
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    affine_degrees: float = 0.0
    affine_translate: float = 0.0  # fraction of the side
    affine_scale: float = 0.0  # 0.1: between 0.9 and 1.1
    reprob: float = 0.0
    remode: str = "pixel"
    repeats: int = 1  # repeated augmentation: each image so often in a row of draws
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch_prob: float = 0.5
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for key in ("hflip", "vflip", "reprob", "mixup_switch_prob", "affine_translate"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"augmentation.{key}", value, "between 0 and 1")
        for key in ("mixup", "cutmix", "color_jitter", "affine_degrees"):
            value = getattr(self, key)
            require(value >= 0, f"augmentation.{key}", value, "0 or more")
        for key in ("smoothing", "affine_scale"):
            value = getattr(self, key)
            require(0 <= value < 1, f"augmentation.{key}", value, "at least 0 and below 1")
        for key in ("scale", "ratio"):
            low_high = getattr(self, key)
            ordered = len(low_high) == 2 and 0 < low_high[0] <= low_high[1]
            require(ordered, f"augmentation.{key}", low_high, "a list of two numbers, 0 < low <= high")
        require_choice("augmentation.interpolation", self.interpolation, INTERPOLATIONS)
        require_choice("augmentation.remode", self.remode, ("const", "rand", "pixel"))
        require(self.repeats >= 1, "augmentation.repeats", self.repeats, "1 or more")
        require_choice("augmentation.runs_on", self.runs_on, ("workers", "device"))
        if self.runs_on == "device":
            rule = "bilinear, bicubic, nearest or random with augmentation.runs_on=device"
            require(self.interpolation != "lanczos", "augmentation.interpolation", self.interpolation, rule)
            policy = self.auto_augment
            rule = "null or timm's rand-m..-n..-mstd..-inc1 with augmentation.runs_on=device"
            known = policy is None or DEVICE_RAND_AUGMENT.fullmatch(policy) is not None
            require(known, "augmentation.auto_augment", policy, rule)


@dataclass
class OptimizerConfig:
    """A timm optimizer. The rate used is lr * global batch / reference_batch (its root with lr_scaling=sqrt)."""

    name: str = "adamw"
    lr: float = 1e-3
    reference_batch: int | None = None  # null: lr is used as it stands
    lr_scaling: str = "linear"
    weight_decay: float = 0.05
    momentum: float | None = None
    betas: list[float] | None = None
    eps: float | None = None
    layer_decay: float | None = None
    clip_grad_norm: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer

    def __post_init__(self) -> None:
        require(self.lr > 0 and math.isfinite(self.lr), "optimizer.lr", self.lr, "above 0")
        reference = self.reference_batch
        require(reference is None or reference >= 1, "optimizer.reference_batch", reference, "null or 1 or more")
        require_choice("optimizer.lr_scaling", self.lr_scaling, ("linear", "sqrt"))
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        decay, clip = self.layer_decay, self.clip_grad_norm
        require(decay is None or 0 < decay <= 1, "optimizer.layer_decay", decay, "null, or above 0 and at most 1")
        require(clip is None or clip > 0, "optimizer.clip_grad_norm", clip, "null or above 0")


@dataclass
class ScheduleConfig:
    """A timm schedule, stepped with every update. Warm-up is part of `epochs`; cool-down epochs come after them."""

    name: str = "cosine"
    epochs: int = 300
    warmup_epochs: float = 0
    cooldown_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    decay_rate: float = 0.1
    decay_epochs: float = 30

    def __post_init__(self) -> None:
        require_choice("schedule.name", self.name, SCHEDULES)
        require(self.epochs >= 1, "schedule.epochs", self.epochs, "1 or more")
        warmup = self.warmup_epochs
        rule = f"0 or more and below schedule.epochs={self.epochs}"
        require(0 <= warmup < self.epochs, "schedule.warmup_epochs", warmup, rule)
        for key in ("cooldown_epochs", "warmup_lr", "min_lr"):
            value = getattr(self, key)
            require(value >= 0, f"schedule.{key}", value, "0 or more")


@dataclass
class TrainerConfig:
    """Where and how the arithmetic runs: Lightning's trainer, and what wraps the model."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate: int = 1  # forward passes per update
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    max_steps: int | None = None  # end after so many updates, though epochs are left; resumes exactly
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    check_val_every_n_epoch: int = 1
    log_every_n_steps: int = 50
    fast_dev_run: bool = False
    detect_anomaly: bool = False
    profiler: str | None = None

    def __post_init__(self) -> None:
        require_choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        require_choice("trainer.strategy", self.strategy, STRATEGIES)
        require_choice("trainer.precision", self.precision, PRECISIONS)
        require(self.num_nodes >= 1, "trainer.num_nodes", self.num_nodes, "1 or more")
        require(self.accumulate >= 1, "trainer.accumulate", self.accumulate, "1 or more")
        steps = self.max_steps
        require(steps is None or steps >= 1, "trainer.max_steps", steps, "null or 1 or more")
        every = self.check_val_every_n_epoch
        require(every >= 1, "trainer.check_val_every_n_epoch", every, "1 or more")
        require(self.log_every_n_steps >= 1, "trainer.log_every_n_steps", self.log_every_n_steps, "1 or more")
        if self.profiler is not None:
            require_choice("trainer.profiler", self.profiler, ("simple", "pytorch"))


@dataclass
class LoggerConfig:
    """Where curves go besides the CSV file that every run writes."""

    name: str = "csv"
    project: str = "fastna"
    entity: str | None = None
    tracking_uri: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        require_choice("logger.name", self.name, ("csv", "tensorboard", "wandb", "mlflow"))


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, evaluated beside them as val_ema/*."""

    enabled: bool = False
    decay: float = 0.9998
    warmup: bool = False  # timm's: the average is short at first
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        require(0 < self.decay < 1, "callbacks.ema.decay", self.decay, "above 0 and below 1")
        require(self.every_n_steps >= 1, "callbacks.ema.every_n_steps", self.every_n_steps, "1 or more")


@dataclass
class CheckpointConfig:
    """`last.ckpt` after every epoch, or also every so many updates; `best.ckpt` by validation top-1."""

    every_n_steps: int | None = None
    every_n_epochs: int = 1

    def __post_init__(self) -> None:
        steps = self.every_n_steps
        require(steps is None or steps >= 1, "callbacks.checkpoint.every_n_steps", steps, "null or 1 or more")
        epochs = self.every_n_epochs
        require(epochs >= 1, "callbacks.checkpoint.every_n_epochs", epochs, "1 or more")


@dataclass
class ReportConfig:
    """report.html at the end of a run."""

    enabled: bool = True
    mistakes: int = 24
    attention_images: int = 4

    def __post_init__(self) -> None:
        require(self.mistakes >= 0, "callbacks.report.mistakes", self.mistakes, "0 or more")
        require(self.attention_images >= 0, "callbacks.report.attention_images", self.attention_images, "0 or more")


@dataclass
class CallbacksConfig:
    """What happens around the training step."""

    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    progress: bool | None = None  # null: a live bar on a terminal, one line per epoch elsewhere


@dataclass
class TrainConfig:
    """One training run."""

    name: str = "run"  # outputs/NAME/DATE
    seed: int = 0
    output_root: str = "outputs"
    output_dir: str | None = None  # null: output_root/name/date
    resume: str | None = None  # last, or a checkpoint's path
    evaluate: bool = True  # the best checkpoint on the test split, at the end
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = MISSING
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2**32 - 1")
        both = self.trainer.strategy == "fsdp" and self.callbacks.ema.enabled
        require(not both, "callbacks.ema.enabled", True, "false with trainer=fsdp, whose weights cannot be copied")
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a folder's name")


@dataclass
class EvalConfig:
    """One evaluation of one checkpoint."""

    ckpt: str = MISSING  # a checkpoint of train.py, an exported folder, or with model_name a file of bare weights
    model_name: str | None = None
    split: str = "test"
    use_ema: bool = True  # where the checkpoint has an average
    data: DataConfig | None = None  # null: what the checkpoint was trained on
    attn_backend: str | None = None
    output_dir: str | None = None  # null: eval-SPLIT beside the checkpoint
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        require_choice("split", self.split, ("train", "val", "test"))


def register_schemas() -> None:
    """Make the schemas known to Hydra. The zoo's models become choices of the group `model` without a file each."""
    import models  # noqa: F401  (registers the zoo with timm)

    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="eval_schema", node=EvalConfig)
    for name, node in DATA_SCHEMAS.items():
        store.store(group="data", name=f"{name}_schema", node=node)
    for name in zoo():
        store.store(group="model", name=name, node={"name": name})


def zoo() -> list[str]:
    """Names of this project's own models."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("models.")]


def to_object(config: DictConfig, schema: type[Config]) -> Config:
    """The composed configuration as plain dataclasses.

    Raises:
        ConfigError: a mandatory key has no value, an interpolation fails, or a value is impossible.
    """
    require_plain_names(OmegaConf.to_container(config, resolve=False))
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give it on the command line, as {missing[0]}=...")
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(str(error))) from error
    if not isinstance(result, schema):
        raise TypeError(f"composed {type(result).__name__}, not {schema.__name__}")
    return result


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as plain containers, for a checkpoint or a YAML file."""
    return dataclasses.asdict(config)
