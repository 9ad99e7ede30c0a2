"""Every ingredient of a recipe, through the real entry point, several to a run."""

from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from training_runs import start

pytestmark = pytest.mark.xdist_group("training_recipes")

BRIEF = [
    "experiment=digits",
    "data.train_limit=64",
    "data.batch_size=8",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "trainer.log_every_n_steps=1",
    "evaluate=false",
    "logger=csv",
]


@pytest.mark.parametrize(
    ("ingredients", "updates"),
    [
        (
            [
                "optimizer=lamb",
                "optimizer.layer_decay=0.8",
                "augmentation.mixup=0.8",
                "augmentation.cutmix=1.0",
                "augmentation.repeats=3",
                "trainer.accumulate=2",
                "trainer.channels_last=true",
                "trainer.compile=true",
            ],
            4,
        ),
        (["optimizer=muon", "trainer.precision=bf16-mixed", "model.grad_checkpointing=true"], 8),
    ],
)
def test_ingredients_train_and_leave_plain_checkpoints(
    tmp_path: Path, monkeypatch, capsys, ingredients: list[str], updates: int
) -> None:
    # What is captured is the same; generating C++ from it would take a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    start("train", *BRIEF, *ingredients, f"output_dir={tmp_path}/run")
    accumulated = 8 // updates
    said = capsys.readouterr().out
    assert f"global batch {8 * accumulated} (8 x 1 processes x {accumulated} accumulated), learning rate" in said
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == updates
    described = saved["fastna"]["model"]
    model = timm.create_model(described["name"], **described["kwargs"])
    assert saved["ema_state_dict"].keys() == model.state_dict().keys()
    assert {f"model.{key}" for key in model.state_dict()} <= saved["state_dict"].keys()
    assert all(torch.isfinite(value).all() for value in saved["ema_state_dict"].values())
    logged = pd.read_csv(tmp_path / "run" / "logs" / "version_0" / "metrics.csv")
    assert {"val/top1", "val_ema/top1"} <= set(logged)
    rates = logged["rate"].dropna()
    assert rates.nunique() >= updates - 1, "the schedule moves with every update"
