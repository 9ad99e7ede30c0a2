"""Optimizer, schedule, loss and mixing, all by timm."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import timm.optim
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from training.config import AugmentationConfig, OptimizerConfig, ScheduleConfig
from training.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Scaling:
    """How many images an update sees, and the learning rate that follows."""

    batch_size: int  # per process and forward pass
    processes: int
    accumulate: int
    rate: float

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.processes * self.accumulate

    def __str__(self) -> str:
        product = f"{self.batch_size} x {self.processes} processes x {self.accumulate} accumulated"
        return f"global batch {self.global_batch} ({product}), learning rate {self.rate:.3g}"


def scale_rate(config: OptimizerConfig, batch_size: int, processes: int, accumulate: int) -> Scaling:
    """Scale the learning rate with the global batch (linear: Goyal et al., 2017), relative to `reference_batch`."""
    rate = config.lr
    if config.reference_batch is not None:
        ratio = batch_size * processes * accumulate / config.reference_batch
        rate *= math.sqrt(ratio) if config.lr_scaling == "sqrt" else ratio
    return Scaling(batch_size, processes, accumulate, rate)


def build_optimizer(model: nn.Module, config: OptimizerConfig, rate: float) -> Optimizer:
    """timm's optimizer of that name, with its parameter groups.

    Biases, norms, LayerScale and what `model.no_weight_decay()` lists (every rpb) are not decayed. With `layer_decay`
    the groups follow `model.group_matcher()`.

    Raises:
        ConfigError: no such optimizer, or one that does not take these arguments.
    """
    known = timm.optim.list_optimizers()
    if config.name not in known:
        raise ConfigError(
            f"optimizer.name={config.name!r}: timm has no such optimizer{did_you_mean(config.name, known)}"
        )
    options: dict[str, Any] = dict(config.kwargs)
    if config.betas is not None:
        options["betas"] = tuple(config.betas)
    if config.eps is not None:
        options["eps"] = config.eps
    if config.momentum is not None:
        options["momentum"] = config.momentum
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=config.name,
            lr=rate,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.name={config.name!r} with {options}: {error}") from error


def split_head(optimizer: Optimizer, model: nn.Module) -> None:
    """Give the parameters of the classifier groups of their own, and mark the other groups as `held`.

    `hold_backbone` can then keep everything but the classifier still.
    """
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    groups = []
    for group in optimizer.param_groups:
        for own in (False, True):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in head) is own]
            if parameters:
                held = {} if own else {"held": True, "free_scale": group.get("lr_scale", 1.0)}
                groups.append({**group, "params": parameters, **held})
    optimizer.param_groups[:] = groups


def hold_backbone(optimizer: Optimizer, hold: bool) -> None:
    """Set the rate of all groups that `split_head` marked to zero, or let it follow the schedule again.

    Their gradients are computed all the same: no parameter enters or leaves what processes exchange.
    """
    for group in optimizer.param_groups:
        if group.get("held"):
            group["lr_scale"] = 0.0 if hold else group["free_scale"]


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Scheduler:
    """timm's schedule of that name, counted in updates. `constant` holds the rate after the warm-up."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_rate=config.decay_rate,
        cooldown_epochs=config.cooldown_epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def build_mixing(config: AugmentationConfig, classes: int) -> Mixup | None:
    """timm's mixup and cutmix, or None where neither is asked for."""
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.smoothing,
        num_classes=classes,
    )


def build_criterion(config: AugmentationConfig, mixed: bool) -> nn.Module:
    """Cross-entropy for soft targets when images are mixed (they carry the smoothing), else for hard ones."""
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


def accepts(function: Any, name: str) -> bool:
    """Whether `function` has a parameter of that name, or takes any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
