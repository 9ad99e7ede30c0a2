"""What a worker process of the GPU suite does: one test at a time, by pytest itself."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from records import Outcome

VARIABLE = "FASTNA_GPU_WORKER"
ROOT = Path(__file__).resolve().parents[2]


class _Reports:
    def __init__(self) -> None:
        self.reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)


def run_test(node: str) -> Outcome:
    """Sets one test up, calls it and takes it down."""
    os.environ[VARIABLE] = "1"
    os.chdir(ROOT)
    listener = _Reports()
    options = ("-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir", str(ROOT))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = pytest.main([*options, node], plugins=[listener])
    seconds = sum(report.duration for report in listener.reports)
    failed = [report for report in listener.reports if report.failed]
    skipped = [report for report in listener.reports if report.skipped]
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        details = "\n".join(report.longreprtext for report in failed)
        return Outcome("failed", details if crash is None else crash.message, seconds, details)
    if skipped:
        reason = skipped[0].longrepr
        return Outcome("skipped", str(reason[2] if isinstance(reason, tuple) else reason), seconds)
    if code != pytest.ExitCode.OK or not listener.reports:
        return Outcome("failed", f"pytest ends with {code!r} and {len(listener.reports)} reports", seconds)
    return Outcome("passed", "", seconds)


def is_usable() -> bool:
    """Whether the CUDA context still answers; gives the memory that PyTorch keeps back to the other workers."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
