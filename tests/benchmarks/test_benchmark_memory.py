"""The memory benchmark's command line, on small maps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory
from scripts import benchmark_memory


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "LAYER", (2, 8, 1))
    monkeypatch.setattr(memory, "GROWING", ((1, 16, 1),))
    path = tmp_path / "results" / "memory.jsonl"
    benchmark_memory.main(["--output", str(path)])
    head, *records = map(json.loads, path.read_text().splitlines())
    assert head["environment"]["device"]
    assert [(r["map"], r["direction"]) for r in records] == [
        (problem, direction)
        for problem in ("8 x 8, batch 2, heads 1", "16 x 16, batch 1, heads 1")
        for direction in ("forward", "backward")
    ]
    for record in records:
        # Forward holds the four tensors, backward their gradients too.
        assert record["peak_bytes"] > record["operands_bytes"] * (2 if record["direction"] == "backward" else 1)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 16 x 16"))
    assert f"| {records[2]['peak_bytes'] / records[2]['operands_bytes']:.3g} |" in row
