"""A killed run that is resumed ends with the weights of one that was never killed, bit for bit."""

from pathlib import Path

import pytest
import torch
from training_runs import SHORT, kill_at_step, run, start

pytestmark = pytest.mark.xdist_group("training_run")


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "workers"), [(3, 2), (12, 0)])
def test_killed_and_resumed_equals_uninterrupted(short_run: Path, tmp_path: Path, step: int, workers: int) -> None:
    folder = tmp_path / "run"
    killed = kill_at_step(SHORT, folder, step, total=20)
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
def test_stopped_by_max_steps_and_resumed_equals_uninterrupted(short_run: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, exactly after one (its validation is still to be logged), and in the middle again."""
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for step in (4, 10, 13, 20):
        resumed = ["resume=last"] if last.exists() else []
        limit = [f"trainer.max_steps={step}"] if step < 20 else []
        # Without a checkpoint after every update, the one of the stop is the only one within the epoch.
        rarely = ["callbacks.checkpoint.every_n_steps=null", "logger=csv", "evaluate=false"]
        start("train", *SHORT, f"output_dir={tmp_path}/run", *rarely, *resumed, *limit)
        assert read(last)["global_step"] == step
    whole = read(short_run / "checkpoints" / "last.ckpt")
    for part in ("state_dict", "ema_state_dict"):
        for key, value in whole[part].items():
            assert torch.equal(value, read(last)[part][key]), f"{part} {key} differs"
    best = (read(path / "checkpoints" / "best.ckpt")["global_step"] for path in (short_run, tmp_path / "run"))
    assert len(set(best)) == 1
