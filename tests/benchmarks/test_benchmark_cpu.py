"""The CPU benchmark's command line, on a setting of seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import linear

ROOT = Path(__file__).parents[2]


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.jsonl"
    setting = ["--models", "nat_mini", "--batch", "1", "--size", "32", "--threads", "1", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/benchmark_cpu.py", *setting, "--output", path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *records = map(json.loads, path.read_text().splitlines())
    assert head["environment"]["device"]
    models = ["swin_tiny_patch4_window7_224", "nat_mini", "nat_mini, attention left out"]
    if linear.ONEDNN_IS_FASTER:
        models.insert(2, "nat_mini, linear layers as Swin-T's")
    assert [(r["mode"], r["model"]) for r in records] == [
        (mode, model) for mode in ("inference", "training") for model in models
    ]
    for baseline, ours in zip(records[:: len(models)], records[1 :: len(models)], strict=True):
        assert baseline["of_baseline"] == 1
        assert ours["of_baseline"] == pytest.approx(ours["images_per_second"] / baseline["images_per_second"])
        assert ours["rounds"] == 2
        assert f"{ours['images_per_second']:.1f}" in done.stdout
