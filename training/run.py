"""The two things a person starts: a training run and an evaluation."""

import logging
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor, nn

from training.build import (
    build_loggers,
    build_model,
    build_trainer,
    create_model,
    is_interactive,
    model_arguments,
    quiet_libraries,
)
from training.callbacks import FiniteLoss, Progress, RunCheckpoint, StepLimit, WeightAverage
from training.checkpoint import (
    BEST,
    FOLDER,
    LAST,
    SavedRun,
    check_resumable,
    describe_run,
    load_full_state_dict,
    newest_checkpoint,
    read_run,
)
from training.config import DataConfig, EvalConfig, ModelConfig, TrainConfig, to_plain
from training.data import ImageData, open_splits
from training.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError, one_line
from training.evaluation import Figures, compute_figures, figures_table, summary_line, write_figures
from training.files import write_text
from training.inference.loading import Loaded, load_model
from training.module import Classifier
from training.optimization import build_optimizer, scale_rate
from training.randomness import INIT, derive_seed, seed_generators
from training.report import write_report

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Where a run's files lie, and its figures where it was evaluated."""

    folder: Path
    figures: Figures | None


def train(config: TrainConfig) -> Outcome:
    """Train, evaluate the best checkpoint, write the report.

    Everything that can be refused is refused before a file is written; a run that fails before its first checkpoint
    takes its folder with it.

    Raises:
        UserError: configuration, data or a checkpoint cannot be used.
    """
    quiet_libraries()
    if getattr(config.data, "labels", None) is not None:
        raise ConfigError(f"data.labels={config.data.labels}: the set serves evaluation only (eval.py)")
    splits = open_splits(config.data)
    if len(splits.train.targets) == 0:
        raise DataError(f"data={config.data.name} has no training images: there is no folder train")
    if len(splits.classes) < 2:
        raise DataError(f"data={config.data.name} has one class, {splits.classes[0]!r}: there is nothing to tell apart")
    arguments = model_arguments(config.model, len(splits.classes), config.data.in_chans, config.data.image_size)
    description = describe_run(config, arguments, splits.classes)
    saved = find_resumed(config)
    if saved is not None:
        for difference in check_resumable(saved, description):
            log.warning("this resumed run is not what an uninterrupted one had been: %s", difference)
    seed_generators(derive_seed(INIT, config.seed))
    model = build_model(config.model, arguments, splits.classes)
    data = ImageData(splits, config.data, config.augmentation, config.seed)
    module = Classifier(model, config, splits.classes, description)

    planned = saved.path.parent.parent if saved is not None else planned_folder(config)
    absent = [folder for folder in (planned, *planned.parents) if not folder.exists()]
    loggers = [] if config.trainer.fast_dev_run else build_loggers(config.logger, planned)
    trainer = build_trainer(
        config.trainer,
        planned,
        epochs=config.schedule.epochs + config.schedule.cooldown_epochs,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        loggers=loggers,
        callbacks=run_callbacks(config, planned),
    )
    scaling = scale_rate(config.optimizer, config.data.batch_size, trainer.world_size, config.trainer.accumulate)
    build_optimizer(model, config.optimizer, scaling.rate)  # refused here, before anything is written
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info("%s: %s trainable parameters, %d classes", config.model.name, f"{weights:,}", len(splits.classes))
    log.info("%s", scaling)
    log.info("run folder %s%s", planned, f", resumed from {saved.path.name}" if saved is not None else "")
    try:
        for logger in loggers:
            logged = {**_flat(to_plain(config)), "global_batch": scaling.global_batch, "rate": scaling.rate}
            logger.log_hyperparams(logged)
        if rank_zero_only.rank == 0 and not config.trainer.fast_dev_run:
            write_text(planned / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
        with data.dead_workers_named():
            trainer.fit(module, datamodule=data, ckpt_path=saved and saved.path, weights_only=True)
    except Exception as error:
        if lost_process(error):
            raise TrainingError(
                f"another process of this run is gone ({one_line(str(error))[-120:]}); its own error, if it had the"
                f" time to say one, is above; go on with resume=last output_dir={planned}"
            ) from error
        if not isinstance(error, UserError):  # a bug: what was written may tell of it
            log.error("stopped by %s; what the run wrote is in %s", type(error).__name__, planned)
            raise
        if absent and trainer.is_global_zero and not (planned / FOLDER / LAST).exists():
            discard(absent)
        raise
    folder = Path(trainer.strategy.broadcast(str(planned)))
    best = folder / FOLDER / BEST
    if not config.evaluate or config.trainer.fast_dev_run or not best.is_file():
        return Outcome(folder, None)
    load_full_state_dict(module.model, read_run(best).weights())
    figures = test(trainer, module, data, "test", folder, f"{config.model.name}, test split, {BEST}")
    if config.callbacks.report.enabled and trainer.is_global_zero:
        if config.trainer.strategy == "fsdp":  # one process alone cannot run a sharded model
            module.model = create_model(config.model.name, arguments, config.model.attn_backend)
            module.model.load_state_dict(read_run(best).weights())
        report = write_report(folder, module, data, figures, config.callbacks.report, split="test")
        Console(markup=False).print(f"report: {report}", soft_wrap=True, highlight=False)
    return Outcome(folder, figures)


def evaluate(config: EvalConfig) -> Outcome:
    """Evaluate one checkpoint on one split; print and write the figures.

    Raises:
        UserError: configuration, data or the checkpoint cannot be used.
    """
    quiet_libraries()
    loaded = load_model(config.ckpt, config.model_name, config.use_ema)
    if config.data is None and loaded.run is None:
        raise ConfigError(f"data: ckpt={config.ckpt} does not say what it was trained on; give data=...")
    data_config = config.data if config.data is not None else loaded.preprocessing
    splits = open_splits(data_config)
    if not (set(splits.classes) <= set(loaded.classes) if splits.is_subset else splits.classes == loaded.classes):
        raise CheckpointError(
            f"ckpt={config.ckpt} knows the {len(loaded.classes)} classes {_some(loaded.classes)},"
            f" but data={data_config.name} has the {len(splits.classes)} classes {_some(splits.classes)}"
        )
    if data_config.in_chans != loaded.preprocessing.in_chans:
        expected = loaded.preprocessing.in_chans
        raise ConfigError(f"data.in_chans={data_config.in_chans}: the checkpoint's model takes {expected}")
    for difference in preprocessing_differences(data_config, loaded.preprocessing):
        log.warning("images are prepared otherwise than the model was made for: %s", difference)
    model = loaded.model
    if config.attn_backend is not None:
        if not hasattr(model, "set_attn_backend"):
            raise ConfigError(f"attn_backend={config.attn_backend}: {loaded.name} has no neighborhood attention")
        model.set_attn_backend(config.attn_backend)
    if splits.is_subset:
        model = nn.Sequential(model, SelectOutputs([loaded.classes.index(name) for name in splits.classes]))
    run = TrainConfig(
        name="eval", model=ModelConfig(loaded.name), data=data_config, trainer=config.trainer, evaluate=True
    )
    described = {"model": {"name": loaded.name, "kwargs": loaded.arguments}}
    module = Classifier(model, run, splits.classes, described)
    data = ImageData(splits, data_config)
    trainer = build_trainer(config.trainer, None)
    split = getattr(data_config, "labels", None) or config.split
    folder = Path(config.output_dir) if config.output_dir else evaluation_parent(loaded) / f"eval-{split}"
    title = f"{loaded.name}, {split} split, {Path(loaded.source).name}"
    figures = test(trainer, module, data, config.split, folder, title)
    if config.report.enabled and trainer.is_global_zero:
        report = write_report(folder, module, data, figures, config.report, split=config.split)
        Console(markup=False).print(f"report: {report}", soft_wrap=True, highlight=False)
    return Outcome(folder, figures)


class SelectOutputs(nn.Module):
    """Some of a model's outputs: `logits` [n, all] to [n, chosen]."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.tensor(chosen), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return logits.index_select(-1, self.chosen)


def preprocessing_differences(data: DataConfig, model: DataConfig) -> list[str]:
    """Where images are prepared otherwise than for the model, as sentences."""
    keys = ("image_size", "interpolation", "crop_pct", "mean", "std")
    pairs = [(key, getattr(data, key), getattr(model, key)) for key in keys]
    return [f"data.{key} is {ours!r}, the model's is {theirs!r}" for key, ours, theirs in pairs if ours != theirs]


def evaluation_parent(loaded: Loaded) -> Path:
    """The run's folder, an exported folder itself, a file's folder; outputs/NAME for what lies on the hub."""
    if loaded.run is not None:
        parent = loaded.run.path.parent
        return parent.parent if parent.name == FOLDER else parent
    path = Path(loaded.source.removeprefix("local-dir:")).expanduser()
    return path if path.is_dir() else path.parent if path.is_file() else Path("outputs") / loaded.name


def test(trainer: Trainer, module: Classifier, data: ImageData, split: str, folder: Path, title: str) -> Figures:
    """Run `module` over a split, every image once over all processes; print the table, write the files."""
    data.test_split = split
    with data.dead_workers_named():
        trainer.test(module, datamodule=data, verbose=False)
    if data.splits.accepted is not None:
        module.predictions = module.predictions.with_accepted(data.splits.accepted)
    figures = compute_figures(module.predictions, module.classes)
    if trainer.is_global_zero:
        console = Console(markup=False)
        console.print(figures_table(figures, title))
        console.print(summary_line(figures), soft_wrap=True, highlight=False)
        write_figures(figures, folder)
    return figures


def run_callbacks(config: TrainConfig, folder: Path) -> list[Callback]:
    """The average first, as what follows may save it; refusal of bad numbers before any saving."""
    averaged = config.callbacks.ema.enabled
    live = config.callbacks.progress if config.callbacks.progress is not None else is_interactive()
    callbacks: list[Callback] = [WeightAverage(config.callbacks.ema)] if averaged else []
    if config.trainer.max_steps is not None and not config.trainer.fast_dev_run:
        callbacks.append(StepLimit(config.trainer.max_steps))
    monitor = "val_ema/top1" if averaged else "val/top1"
    return [*callbacks, FiniteLoss(), Progress(live), RunCheckpoint(folder, config.callbacks.checkpoint, monitor)]


def planned_folder(config: TrainConfig) -> Path:
    """output_root/name/DATE; under SLURM the job's number instead of the date, so that a requeued job finds its own."""
    if config.output_dir is not None:
        return Path(config.output_dir).expanduser()
    parent = Path(config.output_root).expanduser() / config.name
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        return parent / f"slurm-{job}"
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    taken = 1
    folder = parent / name
    while folder.exists():
        taken += 1
        folder = parent / f"{name}-{taken}"
    return folder


def discard(made: list[Path]) -> None:
    """Remove a run's folder and those of its parents that were made for it and hold nothing else; innermost first."""
    shutil.rmtree(made[0], ignore_errors=True)
    for folder in made[1:]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def lost_process(error: Exception) -> bool:
    """Whether a collective failed because the process at its other end died."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return torch.distributed.is_initialized() and any(word in text for word in ("gloo", "nccl", "connection reset"))


def find_resumed(config: TrainConfig) -> SavedRun | None:
    """The checkpoint to go on from: the one asked for, or a requeued SLURM job's own.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    if config.resume is None:
        own = planned_folder(config) / FOLDER / LAST
        return read_run(own) if "SLURM_RESTART_COUNT" in os.environ and own.is_file() else None
    if config.resume != "last":
        return read_run(config.resume)
    root = config.output_dir if config.output_dir is not None else Path(config.output_root) / config.name
    return read_run(newest_checkpoint(Path(root).expanduser()))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
