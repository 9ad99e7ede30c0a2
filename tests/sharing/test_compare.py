"""scripts/compare.py: two real checkpoints, and counts by hand."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from sharing_runs import run
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

import models  # noqa: F401  (registers the zoo)

pytestmark = pytest.mark.xdist_group("sharing")


@pytest.fixture(scope="module")
def other(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a disturbed head."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.head.weight
        weight += 1.5 * weight.std() * torch.randn(weight.shape, generator=generator)
    data = resolve_model_data_config(model)
    save_for_hf(
        model, str(folder), model_config={"label_names": model.pretrained_cfg["label_names"]},
        safe_serialization=True, data_config=data,
    )  # fmt: skip
    return folder


def guesses(folder: Path, paths: list[Path]) -> np.ndarray:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(path).convert("L")) for path in paths])).argmax(-1).numpy()


def test_counts_and_p_value_by_hand(checkpoint, exported, other, pictures, tmp_path) -> None:
    done = run("scripts/compare.py", checkpoint, other, "--data", pictures, "--output", tmp_path)
    paths = sorted(path for path in pictures.rglob("0*.png"))
    target = np.array([int(path.parent.name) for path in paths])
    first, second = guesses(exported, paths), guesses(other, paths)
    right, left = (first == target) & (second != target), (first != target) & (second == target)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["images"] == 40
    assert found["only_first_right"] == right.sum() > 0
    assert found["only_second_right"] == left.sum()
    assert found["both_right"] == ((first == target) & (second == target)).sum() > 0
    assert found["agreement"] == pytest.approx((first == second).mean())
    assert found["top1_second"] == pytest.approx((second == target).mean())
    discordant, fewer = int(right.sum() + left.sum()), int(min(right.sum(), left.sum()))
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    assert found["mcnemar_p_value"] == pytest.approx(min(1.0, 2 * tail))
    differences = pd.read_csv(tmp_path / "differences.csv")
    assert set(differences["image"]) == {str(path) for path, a, b in zip(paths, first, second, strict=True) if a != b}
    assert (differences["right"] == "first").sum() == right.sum()
    per_class = pd.read_csv(tmp_path / "per_class.csv").set_index("class")
    for digit in range(10):
        mine = (second == target)[target == digit].mean() - (first == target)[target == digit].mean()
        assert per_class.loc[digit, "difference"] == pytest.approx(mine)
    assert len(re.findall(r"^unreadable: ", done.err, re.MULTILINE)) == 2
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<figure>") == len(differences)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]{0,20})', page))


def test_a_checkpoint_brings_its_own_data_and_equals_its_export(checkpoint, exported, trained, tmp_path) -> None:
    run("scripts/compare.py", checkpoint, exported, "--output", tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    figures = json.loads((trained / "metrics.json").read_text())
    assert found["images"] == figures["images"]
    assert found["top1_first"] == found["top1_second"] == pytest.approx(figures["top1"])
    assert (found["agreement"], found["mcnemar_p_value"]) == (1.0, 1.0)
    assert pd.read_csv(tmp_path / "differences.csv").empty


def test_models_of_other_classes_are_refused(exported, checkpoint, pictures, tmp_path) -> None:
    folder = tmp_path / "renamed"
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    save_for_hf(model, str(folder), model_config={"label_names": list("abcdefghij")}, safe_serialization=True)
    done = run("scripts/compare.py", checkpoint, folder, "--data", pictures, "--output", tmp_path / "o", check=False)
    assert "two models can be compared only where their classes are the same" in done.error
    done = run("scripts/compare.py", exported, exported, "--output", tmp_path / "o", check=False)
    assert "give --data FOLDER" in done.error


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--batch-size", "0"], "--batch-size 0: must be 1 or more"), (["--output", "README.md/x"], "cannot be made")],
)
def test_what_cannot_be_done_is_refused_before_the_work(checkpoint, tmp_path, options, said) -> None:
    done = run("scripts/compare.py", checkpoint, checkpoint, "--output", tmp_path / "o", *options, check=False)
    assert said in (done.code if isinstance(done.code, str) else done.err)
    assert "0%" not in done.out
