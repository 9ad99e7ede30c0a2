"""What a run does when the disk is full or numbers stop being finite: the last good checkpoint stays whole."""

import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, SHORT, command, environment, start

pytestmark = pytest.mark.xdist_group("training_run")


def limit_file_size() -> None:
    """No file of this process can grow beyond 500 kB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint_whole(short_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(short_run, tmp_path / "run")
    last = folder / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    done = subprocess.run(
        command("train.py", *SHORT, f"output_dir={folder}", "resume=last", "schedule.epochs=3", "logger=csv"),
        cwd=ROOT,
        env=environment(),
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"cannot write {last}" in errors[0]
    assert "the previous last.ckpt is kept whole" in errors[0]
    assert last.read_bytes() == before
    assert not list(folder.rglob(".*"))


BRIEF = [
    "experiment=digits",
    "data.train_limit=64",
    "data.batch_size=16",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "evaluate=false",
    "logger=csv",
    "callbacks.checkpoint.every_n_steps=1",
]


def spoil(model: torch.nn.Module, name: str, batch: int) -> None:
    """Make the output of one submodule not a number from one training batch on."""
    calls = iter(range(10**6))

    def hook(part: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if part.training and next(calls) >= batch else output

    model.get_submodule(name).register_forward_hook(hook)


def test_a_bad_loss_names_step_batch_and_tensor_and_touches_no_weight(tmp_path: Path, monkeypatch, capsys) -> None:
    import training.run

    build = training.run.build_model

    def build_spoiled(*arguments: object) -> torch.nn.Module:
        model = build(*arguments)
        spoil(model, "levels.1.blocks.0.attn", batch=2)
        return model

    monkeypatch.setattr(training.run, "build_model", build_spoiled)
    with pytest.raises(SystemExit):
        start("train", *BRIEF, f"output_dir={tmp_path}/run")
    said = capsys.readouterr().err
    assert "at step 2 (epoch 0, batch 2); the first bad tensor is the output of levels.1.blocks.0.attn" in said
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
