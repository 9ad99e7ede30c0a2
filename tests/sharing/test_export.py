"""scripts/export.py: every format answers as the checkpoint does, elsewhere; the hub gets what the folder holds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sharing_runs import run
from timm.data import resolve_model_data_config

import models
from training.inference.loading import load_model

pytestmark = pytest.mark.xdist_group("sharing")

NAMES = [str(digit) for digit in range(10)]


def original(checkpoint: Path) -> torch.nn.Module:
    """The model rebuilt from what the checkpoint says, without the code under test."""
    described = torch.load(checkpoint, weights_only=True)["fastna"]["model"]
    model = timm.create_model(described["name"], **described["kwargs"])
    models.load_checkpoint(model, checkpoint)
    return model.eval()


@pytest.fixture(scope="module")
def programs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("programs")
    done = run("scripts/export.py", checkpoint, "--output", folder, "--format", "pt2", "onnx")
    return folder, done.out


def test_timm_loads_the_folder_with_weights_names_and_preprocessing(checkpoint: Path, exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    theirs = original(checkpoint).state_dict()
    assert model.state_dict().keys() == theirs.keys() == load_file(exported / "model.safetensors").keys()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg["label_names"] == NAMES
    data = resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"]) == ((1, 32, 32), 1.0)
    assert (list(data["mean"]), list(data["std"])) == ([0.305], [0.33])


def test_the_folder_is_a_checkpoint_like_any_other(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    run("scripts/export.py", f"local-dir:{exported}", "--output", tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        ours, theirs = (folder / name for folder in (tmp_path / "again", exported))
        if name == "config.json":
            ours_config, theirs_config = json.loads(ours.read_text()), json.loads(theirs.read_text())
            assert ours_config["model_args"] == theirs_config["model_args"]
            assert ours_config["label_names"] == NAMES
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_timm_loads_the_folder_in_a_process_of_its_own(exported: Path) -> None:
    code = f"import models, timm; print(timm.create_model('local-dir:{exported}', pretrained=True).num_classes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "10"


def test_card_is_valid_and_says_what_the_model_is(trained: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "mit"
    assert "timm" in data["tags"]
    top1 = json.loads((trained / "metrics.json").read_text())["top1"]
    assert f"Top-1: {100 * top1:.2f} %" in text
    assert "dinat_mini" in text
    assert "arxiv.org/abs/2209.15001" in text
    assert text.count("```") % 2 == 0


def test_the_card_of_its_usage_runs(exported: Path, pictures: Path) -> None:
    """The code block of the card, with the folder in place of the repository."""
    text = (exported / "README.md").read_text()
    code = text.split("```python")[1].split("```")[0].replace("hf-hub:USER/digits", f"local-dir:{exported}")
    from PIL import Image

    scope: dict[str, Any] = {"image": Image.open(next((pictures / "0").glob("*.png")))}
    exec(code, scope)
    assert scope["probabilities"].shape == (1, 10)
    assert scope["names"] == NAMES


def test_pt2_runs_without_this_project_in_batches_of_any_size(checkpoint: Path, programs, tmp_path: Path) -> None:
    folder, out = programs
    images = torch.randn(7, 1, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import json, sys, torch
extra = {{"fastna.json": ""}}
program = torch.export.load({str(folder / "model.pt2")!r}, extra_files=extra).module()
images = torch.load({str(tmp_path / "images.pt")!r})
assert "kernels" not in sys.modules
torch.save([program(images), program(images[:1])], {str(tmp_path / "answers.pt")!r})
print(json.dumps(json.loads(extra["fastna.json"])["classes"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == NAMES
    seven, one = torch.load(tmp_path / "answers.pt")
    expected = original(checkpoint)(images)
    torch.testing.assert_close(seven, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-5)
    assert "model.pt2, within" in out


def test_onnx_equals_the_model_in_batches_of_any_size_and_carries_names(checkpoint: Path, programs) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(programs[0] / "model.onnx", providers=["CPUExecutionProvider"])
    model = original(checkpoint)
    for batch in (1, 2, 9):
        images = torch.randn(batch, 1, 32, 32)
        (found,) = session.run(None, {"image": images.numpy()})
        expected = model(images).detach().numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert session.get_inputs()[0].shape == ["batch", 1, 32, 32]
    assert session.get_outputs()[0].shape == ["batch", 10]
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == NAMES
    assert json.loads(properties["preprocessing"])["image_size"] == 32
    assert properties["architecture"] == "dinat_mini"


def test_a_program_that_answers_otherwise_is_not_written(checkpoint: Path, tmp_path: Path) -> None:
    from training.export.graph import ExportError, trace, write_program

    loaded = load_model(str(checkpoint))
    program = trace(loaded)
    loaded.model.head.bias = torch.nn.Parameter(loaded.model.head.bias + 0.01)  # the program shares the old one
    with pytest.raises(ExportError, match=r"differs from the model by .*not written"):
        write_program(loaded, program, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


class FakeHub:
    """Hugging Face's API at its boundary: keeps what would be uploaded."""

    uploaded: Path
    created: dict[str, Any]

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        FakeHub.created = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, **_: Any) -> bool:
        return False

    def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> str:
        shutil.copytree(folder_path, FakeHub.uploaded)
        return f"https://huggingface.co/{repo_id}"


def test_push_uploads_what_timm_can_load(
    checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub.uploaded = tmp_path / "uploaded"
    monkeypatch.setattr("timm.models._hub.HfApi", FakeHub)
    done = run("scripts/export.py", checkpoint, "--output", tmp_path / "out", "--push", "someone/digits", "--private")
    assert "pushed https://huggingface.co/someone/digits" in done.out
    assert FakeHub.created == {"repo_id": "someone/digits", "private": True, "exist_ok": True}
    assert {path.name for path in FakeHub.uploaded.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    for name in ("model.safetensors", "config.json"):
        assert (FakeHub.uploaded / name).read_bytes() == (exported / name).read_bytes()
    card = (FakeHub.uploaded / "README.md").read_text()
    assert ModelCard(card).data.to_dict()["license"] == "mit"
    assert "hf-hub:someone/digits" in card


def test_a_hub_that_refuses_gives_one_line(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeHub, repo_id: str, **_: Any) -> None:
        raise ConnectionError("401 Unauthorized\nlog in first")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    monkeypatch.setattr("timm.models._hub.HfApi", FakeHub)
    done = run("scripts/export.py", checkpoint, "--output", tmp_path, "--push", "a/b", check=False)
    assert done.error == "error: --push a/b: 401 Unauthorized log in first"
