"""train.py and eval.py as a user calls them: what they write, and what they say when something is wrong."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from training_runs import ROOT, draw_classes, run, start

import models

pytestmark = pytest.mark.xdist_group("training_run")


@pytest.fixture
def refused(capsys, tmp_path):
    """Calls an entry point in this process, as `python train.py ...` does; returns the one line it ends with."""

    def call(*arguments: str, entry: str = "train") -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            start(entry, *arguments)
        assert ended.value.code == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return errors[0]

    return call


@pytest.fixture
def pictures(tmp_path):
    """Two class folders of eight small pictures."""
    return draw_classes(tmp_path / "pictures")


def folder_arguments(root: Path, output: Path) -> list[str]:
    sizes = [
        "data.image_size=32",
        "data.batch_size=4",
        "data.workers=1",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
    ]
    return ["data=imagefolder", f"data.root={root}", f"output_root={output}", *sizes, "trainer=cpu"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optimizer.lrr=1"], r"optimizer\.lrr: there is no such key; did you mean 'lr'"),
        (["optimizer.lr=fast"], r"optimizer\.lr=fast.*could not be converted"),
        (["optimizer.lr=-1"], r"optimizer\.lr=-1\.0: must be above 0"),
        (["schedule.epochs=3", "schedule.warmup_epochs=3"], r"schedule\.warmup_epochs=3.*below schedule\.epochs=3"),
        (["model=dinat_tinny"], r"model=dinat_tinny.*did you mean 'dinat_tiny'"),
        (["model.name=dinat_tinny"], r"model\.name='dinat_tinny'.*did you mean 'dinat_tiny'"),
        (["+model.kwargs.depthz=3"], r"cannot build model dinat_mini.*depthz"),
        (["optimizer.name=adamww"], r"optimizer\.name='adamww'.*did you mean 'adamw'"),
        (["experiment=digit"], r"experiment=digit.*did you mean 'digits'"),
        (["data=imagefolder"], r"data\.root has no value"),
        (["data=imagefolder", "data.root=/no/such"], r"there is no folder /no/such"),
        (["resume=/no/such.ckpt"], r"there is no checkpoint /no/such\.ckpt"),
        (["model.checkpoint=/no/such.pth"], r"model\.checkpoint: /no/such\.pth"),
        (["model.frozen_stages=99"], r"model\.frozen_stages=99"),
        (["trainer.precision=16-mixed"], r"trainer\.precision=16-mixed: needs a GPU; on a CPU bf16-mixed will do"),
        (["trainer.max_steps=0"], r"trainer\.max_steps=0: must be null or 1 or more"),
    ],
)
def test_bad_configuration_is_one_line_and_leaves_nothing(refused, tmp_path, arguments, said) -> None:
    assert re.search(said, refused(f"output_root={tmp_path}/outputs", *arguments))


def test_class_folder_without_images_is_named(refused, pictures, tmp_path) -> None:
    (pictures / "empty").mkdir()
    assert f"{pictures}/empty holds no images" in refused(*folder_arguments(pictures, tmp_path / "outputs"))


def test_a_single_class_is_refused(refused, pictures, tmp_path) -> None:
    shutil.rmtree(pictures / "light")
    line = refused(*folder_arguments(pictures, tmp_path / "outputs"))
    assert line == "error: data=imagefolder has one class, 'dark': there is nothing to tell apart"


def test_validation_class_unknown_to_training_is_named(refused, pictures, tmp_path) -> None:
    split = tmp_path / "split"
    (split / "val").mkdir(parents=True)
    pictures.rename(split / "train")
    for name in ("dark", "grey"):
        (split / "val" / name).mkdir()
    assert "'light'" in refused(*folder_arguments(split, tmp_path / "outputs"))


def test_truncated_image_is_named_from_a_worker_and_nothing_is_left(refused, pictures, tmp_path) -> None:
    for victim in pictures.rglob("*.png"):
        victim.write_bytes(victim.read_bytes()[:200])
    line = refused(*folder_arguments(pictures, tmp_path / "outputs"))
    assert re.search(rf"cannot read image {pictures}/(dark|light)/\d\.png: ", line)


def test_corrupt_and_foreign_checkpoints_are_named(refused, tmp_path, short_run) -> None:
    whole = short_run / "checkpoints" / "last.ckpt"
    corrupt, bare = tmp_path / "corrupt.ckpt", tmp_path / "bare.ckpt"
    corrupt.write_bytes(whole.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(1)}, bare)
    assert f"cannot read checkpoint {corrupt}" in refused(f"ckpt={corrupt}", entry="eval")
    assert f"{bare} is not a checkpoint of train.py" in refused(f"ckpt={bare}", entry="eval")
    assert f"cannot read checkpoint {corrupt}" in refused(f"resume={corrupt}", f"output_root={tmp_path}/outputs")
    line = refused("model=nat_mini", f"resume={whole}", f"output_root={tmp_path}/outputs")
    assert "holds a model with name 'dinat_mini'" in line
    assert "nat_mini" in line
    assert "no checkpoint of this NAT" in refused("model=nat_mini", "model.kwargs={}", f"model.checkpoint={whole}")


def test_evaluating_on_other_classes_is_refused(refused, short_run) -> None:
    last = short_run / "checkpoints" / "last.ckpt"
    line = refused(f"ckpt={last}", "data=digits", "data.classes=[0,1,2]", entry="eval")
    assert "10 classes" in line
    assert "3 classes" in line


def test_a_key_of_data_without_data_is_named(refused, short_run) -> None:
    line = refused(f"ckpt={short_run}/checkpoints/best.ckpt", "data.workers=0", entry="eval")
    assert line.startswith("error: data.workers=0: no data set is named here")


def test_not_a_number_stops_training_and_names_the_step(refused, tmp_path) -> None:
    options = ["optimizer.lr=1e30", "schedule.warmup_epochs=0", "data.train_limit=128", f"output_root={tmp_path}/o"]
    assert re.search(r"at step \d+ \(epoch 0, batch \d+\)|is not finite at step", refused(*options))


class Stranger:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_nothing_from_a_stranger_runs_code(refused, tmp_path) -> None:
    mark, output = tmp_path / "mark", f"output_root={tmp_path}/outputs"
    for name in ("evil.ckpt", "evil.pth"):
        torch.save({"fastna": {}, "state_dict": {"model.weight": Stranger(mark)}}, tmp_path / name)
    assert "cannot read checkpoint" in refused(f"ckpt={tmp_path}/evil.ckpt", entry="eval")
    assert "cannot read checkpoint" in refused(f"resume={tmp_path}/evil.ckpt", output)
    assert "holds more than tensors" in refused(f"model.checkpoint={tmp_path}/evil.pth", output)
    target = ["_target_=pathlib.Path.touch", f"self={mark}"]
    for group in ("model", "optimizer", "data", "callbacks.ema"):
        assert "_target_: there is no such key" in refused(*(f"+{group}.{item}" for item in target), output)
    for group in ("model", "optimizer"):
        assert f"{group}.kwargs._target_: there is no such key" in refused(f"+{group}.kwargs.{target[0]}", output)
    assert not mark.exists()


def test_run_folder_holds_everything(short_run: Path) -> None:
    for name in ("config.yaml", "metrics.json", "per_class.csv", "confusion.csv", "report.html"):
        assert (short_run / name).stat().st_size > 0
    assert list(short_run.glob("tensorboard/events.*"))
    logged = pd.read_csv(short_run / "logs" / "version_0" / "metrics.csv")
    assert {"train/loss_epoch", "val/top1", "val_ema/top1", "val/loss", "rate", "images_per_second"} <= set(logged)
    assert "global batch 16 (16 x 1 processes x 1 accumulated), learning rate" in (short_run / "stdout.txt").read_text()
    assert not list(short_run.rglob(".*"))


def test_report_is_one_self_contained_file(short_run: Path) -> None:
    report = (short_run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', report)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    for heading in ("Curves", "Confusion matrix", "Worst mistakes", "Attention", "Configuration"):
        assert f"<h2>{heading}</h2>" in report
    assert report.count("levels.") >= 4


def test_checkpoint_is_plain_and_rebuilds_the_model_alone(short_run: Path) -> None:
    saved = torch.load(short_run / "checkpoints" / "last.ckpt", weights_only=True)
    described = saved["fastna"]["model"]
    assert saved["fastna"]["classes"] == [str(digit) for digit in range(10)]
    model = timm.create_model(described["name"], **described["kwargs"])
    assert saved["ema_state_dict"].keys() == model.state_dict().keys()
    assert {f"model.{key}" for key in model.state_dict()} <= saved["state_dict"].keys()
    report = models.load_checkpoint(model, short_run / "checkpoints" / "last.ckpt")
    assert report.weights == "averaged weights"
    assert any(
        not torch.equal(saved["ema_state_dict"][k], saved["state_dict"][f"model.{k}"]) for k in model.state_dict()
    )


@pytest.mark.slow
def test_eval_repeats_the_figures_of_the_run(short_run: Path, tmp_path: Path) -> None:
    done = run("eval.py", f"ckpt={short_run}/checkpoints/best.ckpt", f"output_dir={tmp_path}", "trainer=cpu")
    assert "recall" in done.stdout
    assert "top-1" in done.stdout
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path, short_run))
    assert ours == pytest.approx(theirs, rel=1e-5)
    confusion = pd.read_csv(tmp_path / "confusion.csv", index_col=0)
    assert confusion.to_numpy().sum() == ours["images"]
    assert confusion.to_numpy().trace() / ours["images"] == pytest.approx(ours["top1"])


def test_a_sweep_leaves_what_hydra_writes_with_the_runs(tmp_path: Path, capsys) -> None:
    start("train", "-m", "experiment=digits", "trainer.fast_dev_run=true", "seed=1,2", f"output_root={tmp_path}/runs")
    assert capsys.readouterr().out.count("run folder") == 2
    assert (tmp_path / "runs" / "multirun.yaml").is_file()
    assert not (ROOT / "multirun.yaml").exists()
