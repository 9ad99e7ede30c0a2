"""Several processes on CPUs (gloo): the same curve as one, exact evaluation, one folder, lost processes, requeueing."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from training_runs import ROOT, command, environment, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("training_processes")]

# Nothing drawn per process, so that only the order of summation differs.
CURVE = [
    "experiment=digits",
    "data.train_limit=80",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "model.drop_path_rate=0",
    "trainer.log_every_n_steps=1",
    "callbacks.report.enabled=false",
    "logger=csv",
]
SEVERAL = ["trainer=ddp", "trainer.accelerator=cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]


def curve(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "logs" / "version_0" / "metrics.csv")


def read(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run("train.py", *CURVE, "data.batch_size=16", f"output_dir={folder}")
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_the_curve_is_that_of_one_process(alone: Path, tmp_path: Path, processes: int) -> None:
    folder = tmp_path / "runs" / "run"
    launcher = TORCHRUN if processes == 4 else []
    sizes = [f"trainer.devices={processes}", f"data.batch_size={16 // processes}"]
    run(*launcher, "train.py", *CURVE, *SEVERAL, *sizes, f"output_dir={folder}")
    ours, theirs = curve(alone), curve(folder)
    for column in ("train/loss_step", "train/loss_epoch", "val/loss", "val/top1", "val_ema/loss", "rate"):
        assert theirs[column].dropna().tolist() == pytest.approx(ours[column].dropna().tolist(), rel=2e-4), column
    for name in ("confusion.csv", "per_class.csv"):
        assert (folder / name).read_text() == (alone / name).read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["version_0"]


def test_sharded_training_checkpoints_and_resumes(tmp_path: Path) -> None:
    options = [*CURVE, "callbacks=default", "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
    options += ["data.batch_size=8", "callbacks.checkpoint.every_n_steps=1", "evaluate=false"]
    run("train.py", *options, f"output_dir={tmp_path}/whole")
    run("train.py", *options, f"output_dir={tmp_path}/cut", "trainer.max_steps=5")
    run("train.py", *options, f"output_dir={tmp_path}/cut", "resume=last")
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "cut")
    assert whole["global_step"] == resumed["global_step"] == 10
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key


def children(process: int) -> list[int]:
    """Processes started by one, and still running train.py."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed if "train.py" in Path(f"/proc/{child}/cmdline").read_text()]


def test_a_lost_process_ends_the_run_and_it_resumes_exactly(tmp_path: Path) -> None:
    options = [*CURVE, *SEVERAL, "trainer.devices=2", "data.batch_size=8", "callbacks.checkpoint.every_n_steps=1"]
    options += ["evaluate=false"]
    folder = tmp_path / "cut"
    started = subprocess.Popen(
        command("train.py", *options, f"output_dir={folder}", "schedule.epochs=2"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 150
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(children(started.pid)[0], signal.SIGKILL)
    _, said = started.communicate(timeout=60)
    assert started.returncode != 0
    assert "error: another process of this run is gone" in said
    stopped = read(folder)["global_step"]
    assert 1 <= stopped < 10
    run("train.py", *options, f"output_dir={folder}", "resume=last")
    run("train.py", *options, f"output_dir={tmp_path}/whole")
    whole, resumed = read(tmp_path / "whole"), read(folder)
    for part in ("state_dict", "ema_state_dict"):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), f"{key} differs after a loss at step {stopped}"


def test_a_requeued_job_finds_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*CURVE, "data.batch_size=16", f"output_root={tmp_path}", "evaluate=false", "trainer=cpu"]
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run("train.py", *options, "trainer.max_steps=5")
    folder = tmp_path / "digits" / "slurm-4711"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = run("train.py", *options)
    assert f"run folder {folder}, resumed from last.ckpt" in again.stdout
    assert read(folder)["global_step"] == 10
    assert [path.name for path in folder.parent.iterdir()] == ["slurm-4711"]


def test_the_slurm_launcher_is_configured() -> None:
    shown = run("train.py", "hydra/launcher=slurm", "--cfg", "hydra").stdout
    assert "submitit" in shown
    assert "signal_delay_s" in shown


WITNESS = """
import atexit, sys
import torch
from training.cli import run_command
from training.errors import UserError

class Witness:
    def __del__(self):
        print("taken apart")

def main(config):
    torch.distributed.init_process_group("gloo", init_method="file://" + config.output_dir, rank=0, world_size=1)
    print("complete")
    if FAILS:
        raise UserError("something is wrong")

witness = Witness()
atexit.register(print, "farewell")
run_command("train", main)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_one_of_several_leaves_without_taking_the_interpreter_apart(tmp_path: Path, fails: bool) -> None:
    """gloo's threads may still hold tensors then, and ask for an interpreter that is going: the process would abort."""
    program = WITNESS.replace("FAILS", str(fails))
    settings = ["experiment=digits", f"output_dir={tmp_path / 'store'}", "hydra.run.dir=."]
    done = subprocess.run(
        [*command("-c", program), *settings],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "complete\nfarewell\n", done.stderr
    assert done.returncode == int(fails)
    assert ("error: something is wrong" in done.stderr) == fails
