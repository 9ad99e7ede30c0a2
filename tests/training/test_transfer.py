"""scripts/transfer_digits.py: both sides are trained for real; the rate is chosen on validation, not on test."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from training_runs import ROOT

from benchmarks.summary import transfer_table

pytestmark = pytest.mark.xdist_group("training_recipes")


def test_both_sides_are_trained_and_recorded(tmp_path: Path, capsys) -> None:
    spec = importlib.util.spec_from_file_location("transfer_digits", ROOT / "scripts" / "transfer_digits.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    short = ["--seeds", "1", "--epochs", "5", "--rates", "8e-3", "--pretraining-epochs", "2"]
    script.main([*short, "--output", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "transfer-digits.jsonl").read_text().splitlines()]
    assert "torch" in records[0]["environment"]
    sides = {record["side"]: record for record in records[1:]}
    assert sides.keys() == {"from scratch", "fine-tuned"}
    assert all(0 < record["val_top1"] <= 1 for record in sides.values())
    assert "| 5 | fine-tuned | 0.008 |" in capsys.readouterr().out


def test_each_side_is_judged_at_the_rate_that_validation_prefers() -> None:
    rows = [("a", 1.0, 0.5, 0.9), ("a", 2.0, 0.6, 0.3), ("a", 2.0, 0.6, 0.5), ("b", 1.0, 0.7, 0.2)]
    frame = pd.DataFrame([(10, *row) for row in rows], columns=["epochs", "side", "rate", "val_top1", "test_top1"])
    table = transfer_table(frame).set_index("side")
    assert table.loc["a"].tolist() == [10, 2.0, pytest.approx(40), pytest.approx(30), pytest.approx(50), 2]
    assert table.loc["b", "test top-1, mean, %"] == pytest.approx(20)
