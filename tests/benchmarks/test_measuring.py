"""The measuring itself: legal problems, right counts, checked answers, sweeps that resume, reports with the figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import floors, methods, summary, sweep
from benchmarks.cases import SUITES, Case, suite
from kernels.problem import Axis

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Case("small", 2, (8, 9), 2, 16, (3, 3), dtype="float32", rpb=True)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_case_of_a_suite_is_a_legal_problem(name):
    cases = suite(name)
    assert cases
    assert len({case.key for case in cases}) == len(cases)
    assert len(suite(name, quick=True)) <= len(cases)
    for case in cases:
        for axis in case.problem(CPU).axes:
            assert 1 <= axis.stride <= axis.window
            assert axis.window * axis.dilation <= axis.length


def test_paper_suites_are_a_thousand_problems_and_repeatable():
    assert [len(suite(f"paper-{rank}d")) for rank in (1, 2, 3)] == [1000, 1000, 1000]
    assert [case.key for case in suite("paper-2d")] == [case.key for case in suite("paper-2d")]


def test_unknown_suite_is_named():
    with pytest.raises(ValueError, match=r"suite='paper-4d'.*paper-3d"):
        suite("paper-4d")


@pytest.mark.parametrize(
    "axis", [Axis(9, 3), Axis(10, 4, 2), Axis(11, 5, 2, 3), Axis(9, 4, 1, 2, True), Axis(13, 3, 4, 1, True)]
)
def test_pairs_counts_what_windows_hold(axis):
    count = 0
    for token in range(axis.length):
        start, end = axis.window_at(token // axis.dilation, axis.group_length(token % axis.dilation))
        count += end - start
    assert floors.pairs(axis) == count


def test_floor_of_the_first_level_of_nat_is_its_four_tensors():
    case = next(case for case in suite("floors") if case.name == "56^2 h2 d1")
    seconds = floors.floor_seconds(case.problem(CPU), floors.CEILINGS["NVIDIA H200"], "forward")
    assert seconds == pytest.approx(4 * 128 * 56 * 56 * 2 * 32 * 2 / 4.3e12)


def test_tile_waste_is_one_for_a_dense_map_and_grows_with_the_halo():
    dense = Case("dense", 1, (8, 8), 1, 16, (8, 8)).problem(CPU)
    assert floors.tile_waste(dense, (8, 8), (8, 8)) == 1.0
    sliding = Case("sliding", 1, (32, 32), 1, 16, (7, 7)).problem(CPU)
    assert floors.tile_waste(sliding, (8, 8), (8, 8)) > floors.tile_waste(sliding, (4, 4), (4, 4)) > 1.0


def test_sampled_error_sees_one_wrong_head():
    inputs = methods.make_inputs(SMALL, CPU, seed=0, gradient=False)
    output = methods.METHODS["tiled"](SMALL, inputs, False).forward()
    assert methods.sampled_error(SMALL, inputs, output) < 1e-5
    broken = output.clone()
    broken[..., 1, :] = broken[..., 1, :].flip(0)
    assert methods.sampled_error(SMALL, inputs, broken) > 0.1


def test_a_sweep_resumes_and_records_what_it_could_not_time(tmp_path):
    path = tmp_path / "kernels-small.jsonl"
    names, directions = ["tiled", "dense", "natten", "flex"], ["forward", "backward"]
    first = sweep.run("small", [SMALL], names, CPU, directions, path, seconds=0.01)
    assert len(first) == len(names) * len(directions)
    with path.open("a") as file:
        file.write('{"suite": "small", "key": "cut sho')
    assert sweep.run("small", [SMALL], names, CPU, directions, path, seconds=0.01) == []
    frame, facts = summary.load([path])
    assert len(frame) == len(first)
    assert facts[0]["torch"] == torch.__version__
    by_method = frame.groupby("method")["status"].first()
    assert by_method["tiled"] == by_method["dense"] == "ok"
    assert by_method["flex"].startswith("unsupported")
    assert (frame[frame["status"] == "ok"]["seconds"] > 0).all()


def test_a_wrong_method_is_never_timed(tmp_path, monkeypatch):
    right = methods.METHODS["tiled"]

    def wrong(case, inputs, gradient):
        prepared = right(case, inputs, gradient)
        return methods.Prepared(lambda: prepared.forward() * 1.01, prepared.backward)

    monkeypatch.setitem(methods.METHODS, "tiled", wrong)
    (record,) = sweep.run_case(SMALL, ["tiled"], CPU, ["forward"], 0.01)
    assert record["status"].startswith("wrong")
    assert "seconds" not in record


def test_improvement_is_in_the_papers_form():
    records = [
        {"suite": "s", "key": key, "name": key, "case": {"dtype": "float16"}, "method": method, "direction": "forward",
         "status": "ok", "seconds": seconds}
        for key, naive, fused in (("a", 4.0, 1.0), ("b", 1.0, 2.0))
        for method, seconds in (("naive", naive), ("fused", fused))
    ]  # fmt: skip
    row = summary.improvements(__import__("pandas").DataFrame(records), "naive").iloc[0]
    assert (row["average"], row["min"], row["max"]) == (pytest.approx(125), pytest.approx(-50), pytest.approx(300))
    assert row["won"] == 0.5
    assert row["problems"] == 2


def test_the_command_lines_measure_report_and_compare(tmp_path):
    def run(script, *arguments):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    problem = [
        "--space",
        8,
        8,
        "--window",
        3,
        3,
        "--heads",
        2,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--seconds",
        0.01,
    ]
    run("benchmark_kernels.py", *problem, "--direction", "forward", "backward", "--output", tmp_path)
    models = ["--models", "nat_mini", "--batch", 1, "--device", "cpu", "--seconds", 0.1, "--precision", "float32"]
    run("benchmark_models.py", *models, "--backends", "tiled", "--output", tmp_path / "models.jsonl")
    printed = run("report.py", tmp_path, "--against", tmp_path / "kernels-one.jsonl")
    html = (tmp_path / "report.html").read_text()
    assert "| nat_mini |" in printed
    assert "tiled" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    record = next(r for r in map(json.loads, (tmp_path / "models.jsonl").read_text().splitlines()) if "key" in r)
    assert record["images_per_second"] > 0
    assert record["latency_p50_ms"] <= record["latency_p99_ms"]
    assert 0 < record["attention_share"] < 1
    simulated = run("simulate.py", "--space", 32, 32, "--window", 7, 7, "--against", tmp_path / "kernels-one.jsonl")
    assert "over" in simulated
    trace = tmp_path / "trace.json"
    run("profile_model.py", "nat_mini", "--batch", 1, "--device", "cpu", "--precision", "float32", "--trace", trace)
    assert math.isfinite(len(json.loads(trace.read_text())["traceEvents"]))
