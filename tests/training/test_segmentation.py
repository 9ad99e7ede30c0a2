"""examples/segmentation.py: a backbone learns a dense task, at sizes neither square nor multiples of anything."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ROOT, environment


@pytest.mark.slow
def test_a_head_on_the_backbone_learns_to_find_coins(tmp_path: Path) -> None:
    picture = tmp_path / "found.png"
    arguments = ["examples/segmentation.py", "--steps", "40", "--picture", str(picture)]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), check=True, capture_output=True, text=True
    )
    untrained, trained = map(float, re.findall(r"trained (\d\.\d+)", done.stdout))
    assert trained > 0.6
    assert trained > untrained + 0.2
    assert picture.read_bytes().startswith(b"\x89PNG")
