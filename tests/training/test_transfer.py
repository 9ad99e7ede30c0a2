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
    short = ["--seeds", "2", "--epochs", "2", "--rates", "4e-3"]
    script.main([*short, "--output", str(tmp_path)])
    head, *records = [json.loads(line) for line in (tmp_path / "transfer-digits.jsonl").read_text().splitlines()]
    assert "torch" in head["environment"]
    table = transfer_table(pd.DataFrame(records)).set_index("side")["test top-1, mean, %"]
    assert table["fine-tuned"] > table["from scratch"] + 1, "over five seeds it is 5 to 6 points"
    assert "| 2 | fine-tuned | 0.004 |" in capsys.readouterr().out


def test_each_side_is_judged_at_the_rate_that_validation_prefers() -> None:
    rows = [("a", 1.0, 0.5, 0.9), ("a", 2.0, 0.6, 0.3), ("a", 2.0, 0.6, 0.5), ("b", 1.0, 0.7, 0.2)]
    frame = pd.DataFrame([(10, *row) for row in rows], columns=["epochs", "side", "rate", "val_top1", "test_top1"])
    table = transfer_table(frame).set_index("side")
    assert table.loc["a"].tolist() == [10, 2.0, pytest.approx(40), pytest.approx(30), pytest.approx(50), 2]
    assert table.loc["b", "test top-1, mean, %"] == pytest.approx(20)
