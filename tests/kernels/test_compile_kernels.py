"""A representative set of kernels compiles for an old and a new architecture, and does not spill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cuda import census, jit
from kernels.cuda.jit import Compiled, KernelSource

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "compile_kernels.py"


@pytest.mark.parametrize("family", sorted(census.families()))
def test_representative_kernels_compile_without_a_spill(family):
    sources, served = census.families()[family]
    assert sources
    architectures = [name for name in census.QUICK_ARCHITECTURES if name in served]
    assert architectures
    for source in census.few_of_each(sources):
        for architecture in architectures:
            entry = census.Entry(family, source, architecture, jit.compile_kernel(source, architecture))
            assert entry.defect is None, f"{source.name} for {architecture}: {entry.defect}"


def test_the_script_prints_a_row_per_kernel_and_architecture():
    family = sorted(census.families())[0]
    command = [sys.executable, str(SCRIPT), "--quick", "--only", family]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(census.work(census.QUICK_ARCHITECTURES, quick=True, only=family))
    assert f"{count} kernels, 0 with a defect" in done.stdout


def test_spills_and_serialised_matrix_instructions_are_defects():
    source = KernelSource("x.cuh", "x", "", "X", 32)
    logs = {
        "0 bytes spill stores": None,
        "ptxas . 0 bytes stack frame, 96 bytes spill stores, 96 bytes spill loads": "spills 96 bytes",
        "ptxas info : (C7510) Potential Performance Loss: wgmma": "wgmma serialised (C7510)",
    }
    for log, defect in logs.items():
        assert census.Entry("x", source, "sm_90a", Compiled(Path("x"), log, cached=True)).defect == defect


def test_few_of_each_keeps_first_and_last():
    sources = [KernelSource("x.cuh", "x", str(i), "X", 32) for i in range(5)] + [
        KernelSource("x.cuh", "y", "", "X", 32)
    ]
    assert [source.name for source in census.few_of_each(sources)] == ["x<0>", "x<4>", "y"]


def test_a_record_is_brought_up_to_date_and_a_run_that_stopped_goes_on(tmp_path):
    family = sorted(census.families())[0]
    path = tmp_path / "kernels.jsonl"
    items = census.work(["sm_90a"], only=family)
    gone = {"family": family, "kernel": "gone<1>", "architecture": "sm_80", "threads": 32}
    kept = {"family": family, "kernel": items[0][1].name, "architecture": "sm_80", "threads": items[0][1].threads}
    path.write_text(f"{json.dumps(gone)}\n{json.dumps(kept)}\n")
    command = [sys.executable, str(SCRIPT), "--only", family, "--architecture", "sm_90a", "--record", str(path)]
    stopped = subprocess.run([*command, "--seconds", "0"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert stopped.returncode == 1
    assert f"{len(items)} kernels were not compiled" in stopped.stdout
    assert [json.loads(line) for line in path.read_text().splitlines()] == [kept]
    done = subprocess.run([*command, "--quick"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept in rows
    quick = census.work(["sm_90a"], quick=True, only=family)
    fresh = {(row["kernel"], row["architecture"]) for row in rows if row != kept}
    assert fresh == {(source.name, architecture) for _, source, architecture in quick}
    assert all(row["registers"] > 0 and row["defect"] is None for row in rows if row != kept)
