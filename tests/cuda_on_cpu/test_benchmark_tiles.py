"""The script that times candidate tiles: every one is run, told apart, and compared."""

import importlib.util
from pathlib import Path

import pytest
import torch
from emulator import EmulatorRuntime

from benchmarks.cases import Case
from kernels.cuda import runtime, strip, strip_backward

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_tiles.py"
CPU = torch.device("cpu")
CASE = Case("tiny", 1, (9, 10), 1, 32, (7, 7), rpb=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_each_candidate_is_timed_and_compared(emulator: EmulatorRuntime, direction: str) -> None:
    specification = importlib.util.spec_from_file_location("benchmark_tiles", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    problem, device = CASE.problem(CPU), runtime.properties(CPU)
    if direction == "forward":
        tiles = strip.candidate_tiles(problem, device)
    else:
        tiles = strip_backward.candidate_tiles(problem, True, device)
    assert len(tiles) > 1

    records = list(script.run(CASE, direction, CPU, seconds=0.0))

    assert {record["tile"] for record in records} == {str(tile) for tile in tiles}
    assert [record["tile"] for record in records if record["default"]] == [str(tiles[0])]
    assert all(record["error"] < 1e-2 and record["seconds"] > 0 for record in records)
    assert len(set(emulator.kernels)) >= 2, "tiles were not really exchanged"
