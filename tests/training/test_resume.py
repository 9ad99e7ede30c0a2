"""A killed run that is resumed ends with the weights of one that was never killed, bit for bit."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, SHORT, command, environment, run

pytestmark = pytest.mark.xdist_group("training_run")


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def kill_at_step(folder: Path, step: int) -> int:
    """Start the short run and kill it once its last checkpoint has reached `step`; returns the step it has."""
    process = subprocess.Popen(
        command("train.py", *SHORT, f"output_dir={folder}"), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    last, deadline = folder / "checkpoints" / "last.ckpt", time.monotonic() + 200
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if last.exists() and read(last)["global_step"] >= step:
                break
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return read(last)["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "workers"), [(3, 2), (12, 0)])
def test_killed_and_resumed_equals_uninterrupted(short_run: Path, tmp_path: Path, step: int, workers: int) -> None:
    folder = tmp_path / "run"
    killed = kill_at_step(folder, step)
    assert step <= killed < 20
    run("train.py", *SHORT, f"output_dir={folder}", "resume=last", f"data.workers={workers}", "evaluate=false")
    whole, resumed = (read(path / "checkpoints" / "last.ckpt") for path in (short_run, folder))
    assert whole["global_step"] == resumed["global_step"] == 20
    for part in ("state_dict", "ema_state_dict"):
        assert whole[part].keys() == resumed[part].keys()
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), f"{part} {key} differs after a kill at step {killed}"
    moments = (saved["optimizer_states"][0]["state"] for saved in (whole, resumed))
    for ours, theirs in zip(*(list(state.values()) for state in moments), strict=True):
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in ours)
    best = (read(path / "checkpoints" / "best.ckpt") for path in (short_run, folder))
    assert len({saved["global_step"] for saved in best}) == 1


@pytest.mark.slow
def test_resumed_at_the_end_of_an_epoch_equals_uninterrupted(short_run: Path, tmp_path: Path) -> None:
    """Stopped by trainer.max_steps exactly after the first epoch, whose validation is still to be logged."""
    folder = tmp_path / "run"
    run("train.py", *SHORT, f"output_dir={folder}", "trainer.max_steps=10", "evaluate=false")
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == 10
    run("train.py", *SHORT, f"output_dir={folder}", "resume=last", "evaluate=false")
    whole, resumed = (read(path / "checkpoints" / "last.ckpt") for path in (short_run, folder))
    assert resumed["global_step"] == 20
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in whole["state_dict"].items())
