"""The host benchmark's command line: all stages, and what is left beyond the floors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "results" / "host.jsonl"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/benchmark_host.py", "--device", "cpu", "--groups", "1", "--output", path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *records = map(json.loads, path.read_text().splitlines())
    assert head["environment"]["device"]
    assert {record["case"].split()[0] for record in records} == {"strip", "block", "scalar"}
    for record in records:
        stages = record["microseconds"]
        assert stages["own"] == pytest.approx(stages["lookup"] + stages["addresses"])
        assert stages["own"] == pytest.approx(stages["whole"] - stages["allocation"] - stages["launch"])
        assert f"{stages['whole']:.2f}" in done.stdout
