"""Every reader serves the same pictures, classes and order rules; what is missing or broken is named."""

import json
import shutil
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from data_pictures import CLASSES
from hypothesis import given
from hypothesis import strategies as st

from training.config_data import FolderConfig, ParquetConfig, ShardsConfig, TimmConfig
from training.data import open_splits
from training.data.sampling import TrainBatches, stream_order
from training.data.tar import OpenShards, ShardStore, read_contents
from training.errors import ConfigError, DataError


def content(images) -> Counter:
    """Every picture's bytes with its class."""
    return Counter((images.read(index), target) for index, target in enumerate(images.targets))


def shards(**keys) -> ShardsConfig:
    return ShardsConfig(name="shards", **keys)


@pytest.fixture
def configurations(photos, packed, tables, tmp_path):
    info = {
        "splits": {
            split: {
                "name": split,
                "num_samples": count,
                "filenames": [path.name for path in sorted(packed.glob(f"{pattern}-*.tar"))],
                "shard_lengths": [],
            }
            for split, pattern, count in (("train", "train", 96), ("validation", "val", 24))
        }
    }
    listed = tmp_path / "listed"
    shutil.copytree(packed, listed)

    (listed / "_info.json").write_text(json.dumps(info))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    remote, braces = f"file://{packed}/train-000000.tar", f"{packed}/train-{{000001..000003}}.tar"
    return {
        "index": shards(root=str(packed)),
        "glob": shards(train=f"{packed}/train-*.tar", val=f"{packed}/val-*.tar", classes=str(names)),
        "URL and braces": shards(train=f"{remote}::{braces}", val=f"{packed}/val-000000.tar", classes=str(names)),
        "parquet": ParquetConfig(name="parquet", root=str(tables)),
        "parquet patterns": ParquetConfig(
            name="parquet", train=f"{tables}/train-*.parquet", val=f"{tables}/validation-*.parquet"
        ),
        "timm folder": TimmConfig(name="timm", dataset="", root=str(photos)),
        "timm hfds": TimmConfig(name="timm", dataset=f"hfds/{tables}"),
        "timm wds": TimmConfig(name="timm", dataset="wds/", root=str(listed)),
    }


def test_every_reader_serves_the_same_pictures(photos, configurations) -> None:
    expected = open_splits(FolderConfig(name="imagefolder", root=str(photos)))
    assert expected.classes == CLASSES
    for name, config in configurations.items():
        splits = open_splits(config)
        assert splits.classes == (["0", "1", "2"] if name == "timm wds" else CLASSES), name
        assert content(splits.train) == content(expected.train), name
        assert content(splits.val) == content(expected.val), name
        assert splits.test is splits.val, name
        assert splits.train.load(5).size == (8 * (splits.train.load(5).width // 8), 32), name
        assert splits.train.label(0), name


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    streams=st.integers(1, 8),
    window=st.integers(1, 50),
    epoch=st.integers(0, 3),
)
def test_shard_order_is_a_permutation_that_depends_on_seed_and_epoch_alone(counts, streams, window, epoch) -> None:
    order = stream_order(np.array(counts), streams, window, 5, epoch)
    assert sorted(order) == list(range(sum(counts)))
    assert (order == stream_order(np.array(counts), streams, window, 5, epoch)).all()
    if len(counts) > 8:
        assert (order != stream_order(np.array(counts), streams, window, 5, epoch + 1)).any()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_read_shards_of_their_own_and_share_the_batches_of_one(world) -> None:
    counts = np.full(16, 20)

    def order(seed: int, epoch: int) -> np.ndarray:
        return stream_order(counts, 4, 40, seed, epoch)

    alone = list(TrainBatches(320, 8 * world, lambda: (2, 3), epoch_order=order))
    parts = [
        list(TrainBatches(320, 8, lambda: (2, 3), rank=rank, world=world, epoch_order=order)) for rank in range(world)
    ]
    for whole, *shared in zip(alone, *parts, strict=True):
        assert sorted(whole) == sorted(draw for group in shared for draw in group)
    read = [{draw.index // 20 for group in part for draw in group} for part in parts]
    assert sum(len(part) for part in read) <= 16 + world  # a shard may lie across the cut between two streams
    first = {draw.index // 20 for draw in alone[0]}
    assert len(first) <= 4 * 3


def test_missing_shards_are_named(packed, tables, tmp_path) -> None:
    for source, victim, config in (
        (packed, "train-000002.tar", lambda root: shards(root=str(root))),
        (tables, "train-00001-of-00002.parquet", lambda root: ParquetConfig(name="parquet", root=str(root))),
    ):
        root = tmp_path / source.name
        shutil.copytree(source, root)
        (root / victim).unlink()
        with pytest.raises(DataError, match=rf"there is no shard {root}/{victim}"):
            open_splits(config(root))
    with pytest.raises(DataError, match=r"there is no shard .*/train-000009\.tar"):
        open_splits(shards(train=f"{packed}/train-000009.tar", val=f"{packed}/val-*.tar"))
    with pytest.raises(DataError, match=r"data\.train=.*no shard matches"):
        open_splits(shards(train=f"{packed}/none-*.tar", val=f"{packed}/val-*.tar"))
    with pytest.raises(DataError, match=r"there is no .*index\.json.*pack_shards"):
        open_splits(shards(root=str(tmp_path)))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 0.7])
def test_a_truncated_shard_is_named(packed, tables, tmp_path, kept) -> None:
    for path in (packed / "train-000001.tar", tables / "train-00000-of-00002.parquet"):
        cut = tmp_path / path.name
        cut.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DataError, match=r"cannot read shard .*train-000001\.tar.*truncated"):
        read_contents(tmp_path / "train-000001.tar")
    with pytest.raises(DataError, match=r"cannot read shard .*train-00000-of-00002\.parquet"):
        open_splits(ParquetConfig(name="parquet", train=f"{tmp_path}/*.parquet"))


def test_a_shard_that_is_not_what_the_index_says_is_named(packed, tmp_path) -> None:
    root = tmp_path / "packed"
    shutil.copytree(packed, root)
    shutil.copy(root / "train-000003.tar", root / "train-000000.tar")  # 21 pictures, not 25
    images = open_splits(shards(root=str(root))).train
    with pytest.raises(DataError, match=r"train-000000\.tar holds 21 images, where index\.json says 25"):
        images.read(0)


def test_a_sample_without_label_is_named(tmp_path, photos) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(next((photos / "train" / "one").iterdir()), "some/picture.png")
    with pytest.raises(DataError, match=r"sample 'some/picture' has no label"):
        read_contents(path)


def test_labels_that_are_names(tmp_path, photos) -> None:
    for part, name in (("train", "two"), ("train", "one"), ("val", "one"), ("bad", "three")):
        with tarfile.open(tmp_path / f"{part}.tar", "a") as tar:
            tar.add(next((photos / "train" / "one").iterdir()), f"{name}.png")
            (tmp_path / "label").write_text(name)
            tar.add(tmp_path / "label", f"{name}.cls")
    splits = open_splits(shards(train=f"{tmp_path}/train.tar", val=f"{tmp_path}/val.tar"))
    assert (splits.classes, splits.train.targets, splits.val.targets) == (["one", "two"], [1, 0], [0])
    with pytest.raises(DataError, match=r"bad\.tar has the label 'three': there are 2 classes, one, two"):
        open_splits(shards(train=f"{tmp_path}/train.tar", val=f"{tmp_path}/bad.tar"))


def test_a_configuration_cannot_run_a_command(tmp_path, packed, monkeypatch) -> None:
    made = tmp_path / "made"
    url = f"pipe:touch {made}; cat {packed}/train-000000.tar"
    with pytest.raises(DataError, match="FASTNA_SHELL_URLS=1"):
        open_splits(shards(train=url, val=f"{packed}/val-*.tar"))
    assert not made.exists()
    monkeypatch.setenv("FASTNA_SHELL_URLS", "1")
    assert len(open_splits(shards(train=url, val=f"{packed}/val-*.tar")).train.targets) == 25
    assert made.exists()


def test_a_fetch_that_fails_leaves_nothing(tmp_path) -> None:
    store = ShardStore(str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"cannot fetch shard file:///no/such\.tar"):
        store.local("file:///no/such.tar")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_only_so_many_shards_stay_open(packed, monkeypatch) -> None:
    monkeypatch.setattr("training.data.tar.OPEN_SHARDS", 2)
    opened = OpenShards(ShardStore(None))
    for _ in range(2):
        for path in sorted(packed.glob("train-*.tar")):
            assert opened[str(path)].read(0)
    assert len(opened._open) == 2


def test_wrong_columns_classes_and_files_are_named(tables, tmp_path) -> None:
    def parquet(**keys) -> ParquetConfig:
        return ParquetConfig(name="parquet", **keys)

    with pytest.raises(DataError, match=r"data\.label_column=lable: .* did you mean 'label'"):
        open_splits(parquet(root=str(tables), label_column="lable"))
    with pytest.raises(DataError, match=r"data\.train=.*no file matches"):
        open_splits(parquet(train=f"{tables}/nothing-*.parquet"))
    with pytest.raises(DataError, match=r"holds no train-\*\.parquet"):
        open_splits(parquet(root=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"data\.root=None: must be given"):
        parquet()
    with pytest.raises(ConfigError, match=r"data\.train=.*one place only"):
        shards(root="a", train="b")


def test_validation_is_held_out_where_there_is_none(tables, photos) -> None:
    for config in (
        ParquetConfig(name="parquet", train=f"{tables}/train-*.parquet", validation_fraction=0.25),
        TimmConfig(name="timm", dataset="", root=str(photos / "train"), val_split=None, validation_fraction=0.25),
    ):
        splits = open_splits(config)
        assert abs(len(splits.val.targets) - 24) <= 2
        assert len(splits.train.targets) + len(splits.val.targets) == 96
        assert set(splits.val.targets) == {0, 1, 2}


def test_what_timm_cannot_open_is_named() -> None:
    for dataset, said in (
        ("tfds/mnist", "tfds/ is a stream"),
        ("hfids/mnist", "hfids/ is a stream.*use hfds/"),
        ("hfds/nobody/nothing", "timm cannot open data.dataset=hfds/nobody/nothing.*no connection"),
        ("torch/mnist", "timm cannot open data.dataset=torch/mnist.*download"),
        ("torch/mnits", "timm cannot open data.dataset=torch/mnits"),
    ):
        with pytest.raises(DataError, match=said):
            open_splits(TimmConfig(name="timm", dataset=dataset, root="/no/such/folder"))


@pytest.mark.parametrize(("reader", "package"), [("shards", "webdataset"), ("parquet", "datasets")])
def test_a_missing_package_is_named(monkeypatch, packed, tables, reader, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = shards(root=str(packed)) if reader == "shards" else ParquetConfig(name="parquet", root=str(tables))
    with pytest.raises(DataError, match=rf"data={reader} needs the package {package}: pip install 'fastna\[data\]'"):
        open_splits(config)
