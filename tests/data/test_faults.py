"""Broken pictures, lost shards and killed workers through the real command line; kill and resume for each reader."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_pictures import SHORT, pack
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from training_runs import ROOT, command, environment, kill_at_step, run

from training.data.folder import ImageFiles
from training.data.images import Broken, ImageReader, PixelReader
from training.data.sampling import Draw
from training.data.workers import LazyLoader, dead_workers_named, note_reading
from training.errors import DataError

pytestmark = pytest.mark.xdist_group("data_runs")


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "tif", "webp", "bmp"])
def test_a_file_cut_anywhere_is_read_or_named(photos, tmp_path, extension) -> None:
    """Never a crash, in either way of reading; and cut by half it is always named."""
    whole = tmp_path / f"whole.{extension}"
    with Image.open(next((photos / "train" / "one").glob("*.png"))) as picture:
        picture.convert("RGB").resize((48, 48)).save(whole)
    content = whole.read_bytes()
    paths = []
    for length in {*range(0, len(content), max(1, len(content) // 60)), len(content) // 2}:
        paths.append(tmp_path / f"{length}.{extension}")
        paths[-1].write_bytes(content[:length])
    images = ImageFiles(paths, [0] * len(paths))
    for reader in (ImageReader(images, lambda picture: torch.zeros(1), 3), PixelReader(images, 3)):
        read = [reader[Draw(index, 0)] for index in range(len(paths))]
        half = read[[path.stem for path in paths].index(str(len(content) // 2))]
        assert isinstance(half, Broken)
        assert half.label == str(tmp_path / f"{len(content) // 2}.{extension}")
        assert not half.fatal


@pytest.fixture
def spoiled(photos, tmp_path) -> Path:
    """The pictures, of which one in training is cut and one is text."""
    root = tmp_path / "spoiled"
    shutil.copytree(photos, root)
    cut, text = sorted((root / "train" / "two").iterdir())[:2]
    cut.write_bytes(cut.read_bytes()[:200])
    text.write_text("not a picture")
    return root


@pytest.mark.parametrize("reader", ["imagefolder", "shards", "parquet", "timm"])
def test_broken_images_are_named_and_skipped_up_to_a_limit(spoiled, tmp_path, train_here, reader) -> None:
    root = spoiled
    if reader in ("shards", "parquet"):
        root = pack(spoiled, tmp_path / "packed", "--layout", "tar" if reader == "shards" else "parquet")
    data = [f"data={reader}", f"data.root={root}", "data.workers=0", f"output_root={tmp_path}/runs"]
    names = [path.stem for path in sorted((spoiled / "train" / "two").iterdir())[:2]]
    code, printed, said = train_here(*SHORT, *data, "data.broken_image_limit=2")
    assert code == 0, said
    warnings = [line for line in (printed + said).splitlines() if line.startswith("skipped unreadable image")]
    assert len(warnings) == 2, "two epochs read them twice, but each counts once"
    assert all(any(name in line for line in warnings) for name in names)
    assert warnings[-1].endswith("(2 of 2)")
    code, _, said = train_here(*SHORT, *data, "data.broken_image_limit=1")
    assert code == 1
    assert re.search(
        rf"^error: cannot read image .*({'|'.join(names)}).*data\.broken_image_limit=1", said, re.MULTILINE
    )


def test_a_shard_lost_while_training_is_named(packed, tmp_path, train_here) -> None:
    root = tmp_path / "packed"
    shutil.copytree(packed, root)
    cut = root / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])  # as long as nobody reads it, nobody knows
    code, _, said = train_here(
        *SHORT, "data=shards", f"data.root={root}", "data.workers=1", f"output_root={tmp_path}/r"
    )
    assert code == 1
    assert [line for line in said.splitlines() if line.startswith("error")] == [said.strip().splitlines()[-1]]
    assert re.search(rf"^error: cannot read shard {cut}: .*truncated", said, re.MULTILINE)
    assert "Traceback" not in said


def holder(pid: int, fifo: Path) -> int:
    """The child of `pid` that has `fifo` open, or comes to: its writer can be open a moment earlier."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                for link in Path(f"/proc/{child}/fd").iterdir():
                    if os.path.realpath(link) == str(fifo):
                        return int(child)
        time.sleep(0.05)
    raise AssertionError("no worker reads it")


def test_a_killed_worker_is_named_with_the_image_it_read(photos, tmp_path) -> None:
    """The image is a named pipe, so that the worker waits in it to be killed."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    fifo = root / "train" / "one" / "endless.jpg"
    os.mkfifo(fifo)
    arguments = [*SHORT, "data=imagefolder", f"data.root={root}", "data.workers=2", f"output_root={tmp_path}/runs"]
    process = subprocess.Popen(
        command("train.py", *arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        end, writer = time.monotonic() + 200, None
        while writer is None and process.poll() is None and time.monotonic() < end:
            try:
                writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                time.sleep(0.05)
        assert writer is not None, "nobody has read the pipe"
        worker = holder(process.pid, fifo)
        os.kill(worker, signal.SIGKILL)
        said = process.communicate(timeout=100)[1].decode()
        os.close(writer)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, said
    assert re.match(rf"error: data worker [01] \(process {worker}\) .*SIGKILL.* while it read {fifo}; ", errors[0]), (
        said
    )
    assert "Traceback" not in said


class Fatal:
    """One image, which ends the process that reads it."""

    images = ImageFiles([Path("fatal.jpg")], [0])

    def __init__(self, ending: Callable[[], None]) -> None:
        self.ending = ending

    def __getitem__(self, index: int) -> None:
        note_reading(index)
        self.ending()


@pytest.mark.parametrize(
    ("ending", "named"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by signal SIGKILL"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
)
def test_how_a_worker_ended_is_said_where_torch_does_not_know(monkeypatch, ending, named) -> None:
    """It does not if the worker dies while it waits for a batch, or is found missing at a timeout, as here."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._set_SIGCHLD_handler", lambda: None)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    loader = LazyLoader(Fatal(ending), num_workers=1, batch_sampler=[[0]], persistent_workers=True)
    try:
        with pytest.raises(DataError) as error, dead_workers_named([loader]):
            next(iter(loader))
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert str(error.value.__cause__).endswith("exited unexpectedly")
    assert re.match(rf"data worker 0 \(process \d+\) {named} while it read fatal.jpg; ", str(error.value))


def test_a_worker_that_dies_before_the_loader_knows_it_is_named() -> None:
    loader = LazyLoader(Fatal(print), num_workers=1, batch_sampler=[[0]])
    loader.notes.table[0] = torch.tensor([4321, 0])
    named = r"worker 0 \(process 4321\) is killed by signal SIGKILL while it read fatal.jpg"
    with pytest.raises(DataError, match=named), dead_workers_named([loader]):
        raise RuntimeError("DataLoader worker (pid 4321) is killed by signal: Killed. ")


def test_workers_that_hang_are_named() -> None:
    loader = LazyLoader(Fatal(lambda: time.sleep(60)), num_workers=1, batch_sampler=[[0]], timeout=0.2)
    named = r"no batch for 0.2 s \(data.worker_timeout\): worker 0 \(process \d+\) read fatal.jpg last; "
    with pytest.raises(DataError, match=named), dead_workers_named([loader]):
        next(iter(loader))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "more"),
    [
        ("shards", ["data.streams=2", "data.shuffle_window=10", "augmentation.runs_on=device"]),
        ("parquet", ["augmentation.auto_augment=rand-m9-mstd0.5-inc1"]),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(packed, tables, tmp_path, train_here, reader, more) -> None:
    """Killed within the first epoch of six updates; resumed with another number of workers."""
    root = packed if reader == "shards" else tables
    arguments = [*SHORT, *more, f"data={reader}", f"data.root={root}", f"data.cache_dir={tmp_path}/cache"]
    killed = kill_at_step([*arguments, "data.workers=1"], tmp_path / "killed", 2, total=12)
    run("train.py", *arguments, f"output_dir={tmp_path}/killed", "resume=last", "data.workers=2")
    code, _, said = train_here(*arguments, f"output_dir={tmp_path}/whole", "data.workers=0")
    assert code == 0, said
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    assert whole["global_step"] == resumed["global_step"] == 12
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), f"{key} differs after a kill at step {killed}"
