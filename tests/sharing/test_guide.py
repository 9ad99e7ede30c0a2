"""Every command of docs/predict-export.md is run as it stands, or is named here with the test that runs its like."""

import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from sharing_runs import ROOT, has_onnx, run

import models  # noqa: F401  (registers the models)

PAGE = (ROOT / "docs" / "predict-export.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
ELSEWHERE = {
    "python eval.py ckpt=nat_tiny.pth model_name=nat_tiny data=imagenet data.root=IMAGENET": "test_evaluation_sets.py",
    "python eval.py ckpt=exported data=imagenet data.root=IMAGENET data.labels=real": "test_evaluation_sets.py",
    "python scripts/export.py best.ckpt --output exported --push USER/NAME --private": "test_export.py",
}


@pytest.fixture
def folder(checkpoint: Path, exported: Path, pictures: Path, tmp_path: Path) -> Path:
    """A folder with the files that the page names."""
    for name in ("best.ckpt", "first.ckpt", "second.ckpt"):
        shutil.copy(checkpoint, tmp_path / name)
    shutil.copytree(exported, tmp_path / "exported")
    shutil.copytree(pictures, tmp_path / "photos")
    shutil.copy(pictures / "0" / "0000.png", tmp_path / "photo.jpg")
    for number in range(2):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as shard:
            for path in sorted((pictures / str(number)).glob("*.png")):
                shard.add(path, path.name)
    torch.save(timm.create_model("nat_tiny").state_dict(), tmp_path / "nat_tiny.pth")
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not has_onnx, reason="ONNX is not installed")
def test_every_command_of_the_guide_runs(folder: Path) -> None:
    assert set(ELSEWHERE) < set(COMMANDS)
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        program, script, *arguments = shlex.split(command)
        assert program == "python"
        if script == "eval.py":
            arguments += ["trainer=cpu", "report.enabled=false"]
        run(script, *arguments, folder=folder)
    written = ["predictions.csv", "predictions.json", "predictions.parquet", "gallery.html", "top1.csv"]
    written += ["comparison/comparison.html", "exported/model.safetensors", "exported/model.pt2", "exported/model.onnx"]
    assert all((folder / name).stat().st_size > 0 for name in written)
