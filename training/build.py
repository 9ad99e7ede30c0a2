"""From configuration to objects: the model, the loggers, the trainer."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from timm.models import group_parameters
from torch import nn

import models
from training.checkpoint import trained_classes
from training.config import LoggerConfig, ModelConfig, TrainerConfig
from training.errors import CheckpointError, ConfigError, did_you_mean, one_line

log = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """Silence advice of Lightning's that does not apply here: each line says why."""
    for message in (
        ".*does not have many workers.*",  # the number of workers is configured
        ".*is not stateful.*|.*mid-epoch.*|.*resuming from a checkpoint.*",  # LazyLoader starts where the loop stands
        ".*Checkpoint directory .* exists.*",  # a resumed run goes on in its folder
        ".*lr_scheduler.step.*",  # timm's schedules are stepped with the number of updates
        ".*treespec.*",
        ".*The number of training batches.*",  # small data sets
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*sync_dist=True.*",  # torchmetrics objects synchronise themselves
        ".*Trying to infer the `batch_size`.*",
        ".*GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)


def model_arguments(config: ModelConfig, classes: int, in_chans: int, image_size: int) -> dict[str, Any]:
    """Arguments of `timm.create_model` that decide the architecture, as they travel with a checkpoint.

    Raises:
        ConfigError: the model cannot be built, or has no levels that could be dilated.
    """
    arguments: dict[str, Any] = {**config.kwargs, "num_classes": classes, "in_chans": in_chans}
    if config.drop_path_rate is not None:
        arguments["drop_path_rate"] = config.drop_path_rate
    if config.widest_dilations:
        arguments["dilations"] = list(dilations_for(config.name, arguments, image_size))
    return arguments


def dilations_for(name: str, arguments: dict[str, Any], image_size: int) -> tuple[int, ...]:
    """For each level of a model, the dilation that spreads its window over an `image_size` px image.

    Raises:
        ConfigError: the model cannot be built, or has no levels.
    """
    with torch.device("meta"):
        model = create_model(name, arguments)
    layers = models.attention_layers(model)
    strides = [level["reduction"] for level in getattr(model, "feature_info", [])]
    if not layers or len(set(strides)) < 2:
        raise ConfigError(f"model.widest_dilations=true: {name} has no levels of neighborhood attention")
    return models.widest_dilations(image_size, model.get_submodule(layers[0]).kernel_size, strides)


def create_model(name: str, arguments: dict[str, Any], attn_backend: str | None = None, **more: Any) -> nn.Module:
    """`timm.create_model` with errors that name what was asked for.

    Raises:
        ConfigError: no such model, or one that does not take these arguments.
    """
    if not timm.is_model(name):
        raise ConfigError(f"model.name={name!r}: no such model{did_you_mean(name, timm.list_models())}")
    backend = {} if attn_backend is None else {"attn_backend": attn_backend}
    try:
        return timm.create_model(name, **arguments, **backend, **more)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"cannot build model {name} with {arguments | backend}: {one_line(str(error))}") from error


def build_model(config: ModelConfig, arguments: dict[str, Any], classes: list[str]) -> nn.Module:
    """The model to train: weights loaded, stages frozen. Its head is new unless the weights' own classes are `classes`.

    Raises:
        ConfigError: the model cannot be built as configured.
        CheckpointError: model.checkpoint cannot be read or does not fit.
    """
    model = create_model(config.name, arguments, config.attn_backend, pretrained=config.pretrained)
    if config.checkpoint is not None:
        try:
            models.load_checkpoint(model, config.checkpoint)
        except models.CheckpointError as error:
            raise CheckpointError(f"model.checkpoint: {error}") from error
        known = trained_classes(config.checkpoint)
        if known is not None and known != classes and len(known) == len(classes):
            log.info("the head is made new: the checkpoint's %d classes are others than the data's", len(known))
            model.reset_classifier(len(classes))
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(f"model.grad_checkpointing=true: {config.name} has no gradient checkpointing") from error
    freeze(model, config)
    return model


def freeze(model: nn.Module, config: ModelConfig) -> None:
    """Exclude from training the first `frozen_stages` groups of the model, or all but its classifier.

    Raises:
        ConfigError: nothing would be left to train.
    """
    if config.linear_probe:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    elif config.frozen_stages:
        groups = group_parameters(model, model.group_matcher(coarse=True))
        chosen = sorted(groups)[: config.frozen_stages]
        if len(chosen) == len(groups):
            limit = len(groups) - 1
            raise ConfigError(f"model.frozen_stages={config.frozen_stages}: {config.name} has {limit} that can freeze")
        parameters = dict(model.named_parameters())
        for group in chosen:
            for name in groups[group]:
                parameters[name].requires_grad_(False)


def build_loggers(config: LoggerConfig, folder: Path) -> list[Logger]:
    """CSV always (a new file for each start, as the report joins them), and the one asked for."""
    loggers: list[Logger] = [CSVLogger(str(folder), name="logs", flush_logs_every_n_steps=10)]
    match config.name:
        case "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(str(folder), name="", version="tensorboard"))
        case "wandb":
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(
                _optional(WandbLogger, config, save_dir=folder, entity=config.entity, offline=config.offline)
            )
        case "mlflow":
            from lightning.pytorch.loggers import MLFlowLogger

            loggers.append(_optional(MLFlowLogger, config, tracking_uri=config.tracking_uri or f"file:{folder}/mlflow"))
    return loggers


def _optional(logger: type[Logger], config: LoggerConfig, **options: Any) -> Logger:
    project = "project" if config.name == "wandb" else "experiment_name"
    try:
        return logger(**{project: config.project}, **options)
    except ModuleNotFoundError as error:
        raise ConfigError(f"logger={config.name}: {one_line(str(error))}; pip install {config.name}") from error


def build_strategy(config: TrainerConfig) -> Strategy | str:
    """DDP without buffer broadcast, as evaluation deals each process other batches; FSDP2 over all processes."""
    if config.strategy == "ddp":
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    if config.strategy == "fsdp":
        local = config.devices if isinstance(config.devices, int) else max(torch.cuda.device_count(), 1)
        return ModelParallelStrategy(local * config.num_nodes, 1, save_distributed_checkpoint=False)
    return config.strategy


def build_trainer(
    config: TrainerConfig,
    folder: Path | None,
    *,
    epochs: int = 1,
    clip_grad_norm: float | None = None,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
) -> Trainer:
    """Lightning's trainer. Checkpoints, progress and sampling are this project's own callbacks and samplers.

    Raises:
        ConfigError: this machine does not have what was asked for.
    """
    if config.profiler == "pytorch":
        from lightning.pytorch.profilers import PyTorchProfiler

        profiler: Any = PyTorchProfiler(dirpath=folder, filename="profile", export_to_chrome=True)
    else:
        profiler = config.profiler
    try:
        trainer = Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=build_strategy(config),
            precision=config.precision,
            max_epochs=epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=clip_grad_norm,
            gradient_clip_algorithm="norm" if clip_grad_norm is not None else None,
            limit_train_batches=config.limit_train_batches,
            limit_val_batches=config.limit_val_batches,
            limit_test_batches=config.limit_test_batches,
            check_val_every_n_epoch=config.check_val_every_n_epoch,
            log_every_n_steps=config.log_every_n_steps,
            fast_dev_run=config.fast_dev_run,
            detect_anomaly=config.detect_anomaly,
            deterministic=config.deterministic,
            num_sanity_val_steps=0,
            profiler=profiler,
            logger=loggers or False,
            callbacks=callbacks or [],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (ValueError, RuntimeError, TypeError) as error:  # MisconfigurationException is not one class over versions
        raise ConfigError(f"trainer: {one_line(str(error))}") from error
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":
            raise ConfigError(f"trainer: {one_line(str(error))}") from error
        raise
    if trainer.precision != config.precision:  # Lightning warns, and goes on with another
        raise ConfigError(f"trainer.precision={config.precision}: needs a GPU; on a CPU {trainer.precision} will do")
    return trainer


def is_interactive() -> bool:
    """Whether a person watches: standard output is a terminal and this is no CI job."""
    return sys.stdout.isatty() and not os.environ.get("CI") and torch.utils.data.get_worker_info() is None
