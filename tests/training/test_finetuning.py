"""experiment=finetune on a folder of pictures, from the published file formats."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from test_model_checkpoints import to_hugging_face
from training_runs import draw_classes, start

import models
from training.build import dilations_for
from training.errors import ConfigError

pytestmark = pytest.mark.xdist_group("training_recipes")

SMALL = {"embed_dim": 32, "depths": [1, 2, 1, 1]}
ARGUMENTS = [
    "experiment=finetune",
    "+model.kwargs.embed_dim=32",
    "+model.kwargs.depths=[1,2,1,1]",
    "data.batch_size=4",
    "data.workers=0",
    "trainer=cpu",
    "schedule.epochs=1",
    "evaluate=false",
    "logger=csv",
    "optimizer.lr=1e-3",
]


def published(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Write a file of published layout with 1,000 classes; returns its weights under the original names."""
    torch.manual_seed(0)
    weights = timm.create_model(name, **SMALL).state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(to_hugging_face(weights), path)
    else:
        torch.save(weights, path)
    return weights


def finetune(tmp_path: Path, file: str, name: str, *more: str) -> tuple[dict, dict]:
    """Fine-tune once; returns the weights in the file and the checkpoint that the run left."""
    before = published(tmp_path / file, name)
    pictures, output = draw_classes(tmp_path / "pictures"), tmp_path / "run"
    places = [f"model={name}", f"model.checkpoint={tmp_path / file}", f"data.root={pictures}", f"output_dir={output}"]
    start("train", *ARGUMENTS, *places, *more)
    return before, torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)


def changed(before: dict, saved: dict) -> set[str]:
    """Keys whose weights the run moved."""
    return {key for key, value in before.items() if not torch.equal(saved["state_dict"][f"model.{key}"], value)}


def test_original_file_to_another_resolution_with_layer_decay_and_frozen_stages(tmp_path: Path) -> None:
    more = ["data.image_size=96", "model.widest_dilations=true", "optimizer.layer_decay=0.8", "model.frozen_stages=2"]
    before, saved = finetune(tmp_path, "nat_mini.pth", "nat_mini", *more)
    described = saved["fastna"]
    assert described["classes"] == ["dark", "light"]
    assert described["model"]["kwargs"]["dilations"] == [3, 1, 1, 1]
    assert saved["state_dict"]["model.head.weight"].shape == (2, 256)
    moved = changed({key: value for key, value in before.items() if not key.startswith("head.")}, saved)
    assert not {key for key in moved if key.startswith(("patch_embed.", "levels.0."))}
    assert {key.split(".")[1] for key in moved if key.startswith("levels.")} == {"1", "2", "3"}
    model = timm.create_model(described["model"]["name"], **described["model"]["kwargs"])
    models.load_checkpoint(model, tmp_path / "run" / "checkpoints" / "best.ckpt")


def test_hugging_face_file_in_grey_with_another_window_and_a_head_that_warms_up(tmp_path: Path) -> None:
    grey = ["data.in_chans=1", "data.mean=[0.45]", "data.std=[0.22]", "data.image_size=64"]
    more = [*grey, "augmentation=light", "+model.kwargs.kernel_size=5", "model.head_warmup_epochs=1"]
    before, saved = finetune(tmp_path, "model.safetensors", "dinat_mini", *more)
    for key in ("levels.1.blocks.1.attn.qkv.weight", "levels.3.blocks.0.mlp.fc1.bias", "norm.weight"):
        assert torch.equal(saved["state_dict"][f"model.{key}"], before[key])
    assert saved["state_dict"]["model.patch_embed.proj.0.weight"].shape[1] == 1
    assert saved["state_dict"]["model.levels.0.blocks.0.attn.rpb"].shape[1:] == (9, 9)
    moments = saved["optimizer_states"][0]["param_groups"]
    assert {group["lr_scale"] for group in moments if group.get("held")} == {0.0}
    assert {group["lr"] > 0 for group in moments if not group.get("held")} == {True}

    start(
        "train",
        *ARGUMENTS,
        *more,
        "model=dinat_mini",
        f"model.checkpoint={tmp_path}/model.safetensors",
        f"data.root={tmp_path}/pictures",
        f"output_dir={tmp_path}/run",
        "schedule.epochs=2",
        "resume=last",
    )
    resumed = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert "levels.1.blocks.1.attn.qkv.weight" in changed({k: v for k, v in before.items() if "qkv" in k}, resumed)


def test_linear_probe_moves_the_head_alone_and_other_classes_get_a_new_one(tmp_path: Path) -> None:
    _, saved = finetune(tmp_path, "nat_mini.pth", "nat_mini", "data.image_size=32", "model.linear_probe=true")
    first = saved["state_dict"]
    (tmp_path / "pictures" / "dark").rename(tmp_path / "pictures" / "black")
    start(
        "train",
        *ARGUMENTS,
        "model=nat_mini",
        f"model.checkpoint={tmp_path}/run/checkpoints/last.ckpt",
        f"data.root={tmp_path}/pictures",
        f"output_dir={tmp_path}/second",
        "data.image_size=32",
        "model.linear_probe=true",
        "optimizer.lr=1e-9",
    )
    second = torch.load(tmp_path / "second" / "checkpoints" / "last.ckpt", weights_only=True)
    assert second["fastna"]["classes"] == ["black", "light"]
    moved = {key for key, value in first.items() if not torch.allclose(value, second["state_dict"][key], atol=1e-6)}
    assert moved == {"model.head.weight", "model.head.bias"}


def test_dilations_by_the_published_rule() -> None:
    assert dilations_for("dinat_tiny", {}, 384) == (13, 6, 3, 1)
    assert dilations_for("dinat_large", {"kernel_size": 11}, 384) == (8, 4, 2, 1)
    with pytest.raises(ConfigError, match="vitrpb_small has no levels"):
        dilations_for("vitrpb_small", {}, 384)
