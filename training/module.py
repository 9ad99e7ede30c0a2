"""The Lightning module: one classifier, one training step, its metrics."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from training.config import TrainConfig
from training.data import Batch
from training.evaluation import Predictions
from training.optimization import (
    build_criterion,
    build_mixing,
    build_optimizer,
    build_schedule,
    hold_backbone,
    scale_rate,
    split_head,
)
from training.randomness import STEP, derive_seed, seed_generators


class EvalMetrics(nn.Module):
    """Loss, top-1 and top-5 over one pass; what does not count (target -1) is left out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric()
        accuracies = {
            f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro", ignore_index=-1)
            for k in (1, 5)
            if k < classes
        }
        self.accuracy = MetricCollection(accuracies)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """`logits` [n, classes]; `target` [n]."""
        counted = target >= 0
        if not counted.any():
            return
        losses = functional.cross_entropy(logits[counted].float(), target[counted], reduction="none")
        self.loss.update(losses)
        self.accuracy.update(logits[counted], target[counted])

    def items(self) -> dict[str, Any]:
        """The metric objects by name, for Lightning to compute and reset."""
        return {"loss": self.loss, **{name: self.accuracy[name] for name in self.accuracy}}


class Classifier(LightningModule):
    """Trains `model` as `config` says.

    Checkpoints hold the model under `state_dict` with the prefix `model.`, and under `fastna` what is needed
    to rebuild it: see training/checkpoint.py.

    Args:
        model: a timm model with `len(classes)` outputs.
        config: the whole run's configuration.
        classes: class names in the order of the outputs.
        description: plain containers that travel with every checkpoint.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, classes: list[str], description: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.classes = classes
        self.description = description
        self.mixing = build_mixing(config.augmentation, len(classes))
        self.criterion = build_criterion(config.augmentation, mixed=self.mixing is not None)
        self.val_metrics = EvalMetrics(len(classes))
        self.predictions = Predictions.empty()
        self._collected: list[Predictions] = []
        self._wrapped = False

    def configure_model(self) -> None:
        """Shard for FSDP, choose the memory format, compile; in place, so that no parameter changes its name."""
        if self._wrapped:
            return
        self._wrapped = True
        if self.config.trainer.strategy == "fsdp":
            shard(self.model, self.device_mesh["data_parallel"])
        if self.config.trainer.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.config.trainer.compile:
            # FSDP's hooks cut the graph at every block. Compiled for any shape at once, which the levels' unlike maps
            # lead PyTorch to, some of these pieces fail in its C++ generator; images have one size anyway.
            self.model.compile(dynamic=False if self.config.trainer.strategy == "fsdp" else None)

    def configure_optimizers(self) -> dict[str, Any]:
        """timm's optimizer and its schedule, counted in updates."""
        trainer, config = self.trainer, self.config
        scaling = scale_rate(config.optimizer, config.data.batch_size, trainer.world_size, config.trainer.accumulate)
        optimizer = build_optimizer(self.model, config.optimizer, scaling.rate)
        if config.model.head_warmup_epochs:
            split_head(optimizer, self.model)
        trainer.fit_loop.setup_data()  # else the number of batches is not known yet
        updates = -(-int(trainer.num_training_batches) // config.trainer.accumulate)
        scheduler = build_schedule(optimizer, config.schedule, updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "rate"}}

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:
        """timm's schedules want the number of updates done."""
        scheduler.step_update(num_updates=self.global_step)

    def on_train_epoch_start(self) -> None:
        """Hold all but the classifier in the first epochs, where that is asked for."""
        epochs = self.config.model.head_warmup_epochs
        if epochs:
            hold_backbone(self.trainer.optimizers[0], hold=self.current_epoch < epochs)
            self.trainer.lr_scheduler_configs[0].scheduler.step_update(num_updates=self.global_step)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Mixup and drop path draw from generators seeded by position, so that a resumed run draws the same."""
        seed_generators(derive_seed(STEP, self.config.seed, self.current_epoch, batch_idx, self.global_rank))

    def classify(self, model: nn.Module, image: Tensor) -> Tensor:
        """Logits [n, classes] of `image` [n, c, h, w] by `model`, in the configured memory format."""
        if self.config.trainer.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return model(image)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The loss of one batch; None where none of its images could be read."""
        image, target = batch.image, batch.target
        if self.mixing is not None:
            even = len(target) // 2 * 2  # timm's mixup pairs the images up; an unreadable one leaves another alone
            image, target = image[:even], target[:even]
        if len(target) == 0:
            return None
        if self.mixing is not None:
            image, target = self.mixing(image, target)
        loss = self.criterion(self.classify(self.model, image), target)
        several = self.trainer.world_size > 1
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(target), sync_dist=several)
        self.log("rate", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update and log the metrics of the weights as they are."""
        if len(batch.target):
            self.val_metrics.update(self.classify(self.model, batch.image), batch.target)
        self.log_dict({f"val/{name}": metric for name, metric in self.val_metrics.items().items()}, batch_size=1)

    def on_test_epoch_start(self) -> None:
        self._collected = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep what the model answered for every image that counts."""
        if len(batch.target):
            logits = self.classify(self.model, batch.image)
            self._collected.append(Predictions.from_logits(logits, batch.target, batch.index))

    def on_test_epoch_end(self) -> None:
        """Gather all processes' predictions into `self.predictions`, one for each image."""
        self.predictions = Predictions.gather(self._collected)
        self._collected = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fastna"] = self.description


def shard(model: nn.Module, mesh: Any) -> None:
    """FSDP2: shard every block of a list of blocks, then what remains."""
    from torch.distributed.fsdp import fully_shard

    lists = (nn.ModuleList, nn.Sequential)
    for container in model.modules():
        if isinstance(container, lists):
            for block in container:
                nested = any(isinstance(inner, lists) for inner in block.modules())
                if not nested and any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
