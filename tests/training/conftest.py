"""One short real run, through the real command line, that many tests look at."""

from pathlib import Path

import pytest
from training_runs import SHORT, run


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the uninterrupted short run, evaluated and reported; `stdout.txt` is what it printed."""
    folder = tmp_path_factory.mktemp("short") / "run"
    done = run("train.py", *SHORT, f"output_dir={folder}")
    (folder / "stdout.txt").write_text(done.stdout)
    return folder
