"""scripts/pack_shards.py and scripts/benchmark_data.py, and every command of docs/data.md, as they are called."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from data_pictures import pack
from training_runs import ROOT

GUIDE = (ROOT / "docs" / "data.md").read_text()
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_equal_pictures_give_equal_bytes_and_an_interrupted_packing_goes_on(photos, tmp_path, capsys, layout) -> None:
    options = ["--layout", layout, "--images-per-shard", "40"]
    whole = files(pack(photos, tmp_path / "whole", *options))
    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved)
    stopped = pack(moved, tmp_path / "stopped", *options, "--workers", "2")
    assert files(stopped) == whole
    for name in list(whole)[-2:]:
        (stopped / name).unlink()
    (stopped / "index.json").unlink(missing_ok=True)
    capsys.readouterr()
    pack(photos, stopped, *options)
    assert "96 of train, 24 of val; 2 shards written, 2 found, 0 left out" in capsys.readouterr().out
    assert files(stopped) == whole


def test_a_packing_of_something_else_is_not_mixed_in(photos, packed, tmp_path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = files(packed)
    for target, said in ((packed, "of other pictures or options"), (tmp_path / "full", "is not empty")):
        with pytest.raises(SystemExit, match="1"):
            pack(photos, target, "--images-per-shard", "24")
        assert said in capsys.readouterr().err
    assert files(packed) == before


def test_broken_pictures_are_left_out_and_named(photos, tmp_path, capsys) -> None:
    broken = tmp_path / "photos"
    shutil.copytree(photos, broken)
    victim = next((broken / "train" / "two").glob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:300])
    packed = pack(broken, tmp_path / "packed", "--check", "--images-per-shard", "40")
    said = capsys.readouterr().out
    assert f"left out {victim}: " in said
    assert "95 of train, 24 of val" in said
    index = json.loads((packed / "index.json").read_text())
    assert sum(len(shard["targets"]) for shard in index["splits"]["train"]) == 95
    assert all(shard["bytes"] == (packed / shard["name"]).stat().st_size for shard in index["splits"]["train"])


def test_names_that_webdataset_would_cut_are_kept_apart(photos, tmp_path) -> None:
    source = tmp_path / "photos"
    picture = next((photos / "train" / "one").glob("*.png")).read_bytes()
    for part in ("train", "val"):
        for name in ("a.b.png", "a_b.png", "ä c.png"):
            path = source / part / "v1.0" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
    from training.data.tar import read_contents

    pack(source, tmp_path / "packed")
    keys = read_contents(tmp_path / "packed" / "train-000000.tar").key
    assert sorted(keys) == ["v1.0/a_b", "v1.0/a_b_2", "v1.0/ä_c"]


@pytest.fixture
def guide_folder(photos, tmp_path) -> Path:
    """A folder with photos/ in it, where the guide's commands are called."""
    shutil.copytree(photos, tmp_path / "here" / "photos")
    return tmp_path / "here"


def test_every_command_of_the_guide_runs(guide_folder, train_here, monkeypatch, capsys) -> None:
    assert len(COMMANDS) == 9
    monkeypatch.chdir(guide_folder)
    for command in COMMANDS:
        program, script, *arguments = shlex.split(command)
        assert program == "python"
        if script == "train.py":
            short = ["debug=fast_dev_run", "trainer=cpu", "data.workers=0", "data.batch_size=2", "data.image_size=32"]
            smaller = ["model.name=dinat_mini", "+model.kwargs.depths=[1,1,1,1]", "+model.kwargs.embed_dim=32"]
            code, _, said = train_here(*arguments, *short, *smaller)
            assert code == 0, f"{command}: {said}"
        else:
            if script.endswith("benchmark_data.py"):
                arguments += ["--output", str(guide_folder), "--size", "32", "--batch", "4"]
                arguments += ["--pictures", "12", "--workers", "0"]
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = [json.loads(line) for line in (guide_folder / "data.jsonl").read_text().splitlines()]
    records = [line for line in lines if "reader" in line]
    assert len(records) == (4 + 2) * 3
    assert {record["bottleneck"] for record in records} <= {"read", "decode", "augment", "collate"}
    for record in records:
        of_worker = ["read", "decode", "collate"] + ["augment"] * (record["augmented_on"] == "workers")
        microseconds = sum(record[f"{step}_us"] for step in of_worker)
        assert record["images_per_second_per_core"] == pytest.approx(1e6 / microseconds)
        assert record["loader_0_workers"] > 0


def test_a_wrong_folder_is_one_line(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="1"):
        pack(tmp_path / "none", tmp_path / "packed")
    said = capsys.readouterr().err
    assert said.startswith(f"error: data.root: there is no folder {tmp_path}/none")
    assert said.count("\n") == 1
    assert not (tmp_path / "packed").exists()
