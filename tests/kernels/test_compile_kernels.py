"""A representative set of kernels compiles for an old and a new architecture, and does not spill."""

from __future__ import annotations

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
    count = len(list(census.compile_all(census.QUICK_ARCHITECTURES, quick=True, only=family)))
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
