"""The script that times commands; the commands themselves are run by the tests of the guides."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from benchmarks import report

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_tasks.py"


@pytest.fixture
def tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tasks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_command_is_timed_and_listed(tasks, monkeypatch, tmp_path, capsys) -> None:
    assert tasks.TASKS.keys() == tasks.WHAT.keys()
    monkeypatch.setattr(tasks, "TASKS", {"help": "scripts/pack_shards.py --help"})
    monkeypatch.setattr(tasks, "WHAT", {"help": "of {pictures} pictures"})
    tasks.main(["--tasks", "help", "--pictures", "2", "--output", str(tmp_path)])
    head, record = map(json.loads, (tmp_path / "tasks.jsonl").read_text().splitlines())
    assert head["environment"]["device"]
    assert (record["task"], record["what"]) == ("help", "of 2 pictures")
    assert record["seconds"] > 0.1, "Python alone takes longer to start"
    assert record["peak_mib"] > 10
    table = report.tables([tmp_path / "tasks.jsonl"])["tasks"]
    pd.testing.assert_frame_equal(table, report.task_table(pd.DataFrame([record])))
    assert "| help | of 2 pictures |" in capsys.readouterr().out


def test_a_command_that_fails_is_shown(tasks, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"pack_shards.py --layout=zip: ended with 2\n(?s:.*)invalid choice: 'zip'"):
        tasks.measure("scripts/pack_shards.py --layout=zip", tmp_path)
