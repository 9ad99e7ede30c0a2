"""Tests in this folder need an NVIDIA GPU: `make test-gpu`, or `python3 -m pytest -m gpu tests/gpu`.

They need PyTorch, CuPy, NumPy and pytest, and the model tests timm; nothing of the training stack.

Each test runs in one of a few worker processes, several at a time: there kernels compile side by side, and a test that
loses its CUDA context, hangs or crashes fails alone. This process only collects and reports. Environment:
  FASTNA_GPU_FUZZ     configurations of the fuzz, of 20 calls each (100)
  FASTNA_GPU_WORKERS  processes (12, or as many as there are processors); 0 runs tests in this process, for a debugger
  FASTNA_GPU_TIMEOUT  seconds that one test may take (180)
  FASTNA_CACHE_DIR    compiled kernels; compile_ahead.py fills it on a machine without a GPU
  FASTNA_GPU_RECORD   a file to write the record of the run to, as JSON
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(ROOT / "tests" / "cuda_on_cpu")]
os.environ.setdefault("FASTNA_TUNING", "tables")  # what a test runs should not depend on a measurement
os.environ.setdefault("FASTNA_CACHE_DIR", str(Path(tempfile.gettempdir()) / "fastna-gpu-tests"))

import in_worker  # noqa: E402
from isolation import WorkerError, Workers  # noqa: E402
from records import Outcome, Record  # noqa: E402

WORKERS = int(os.environ.get("FASTNA_GPU_WORKERS", min(os.cpu_count() or 1, 12)))
TIME_LIMIT = float(os.environ.get("FASTNA_GPU_TIMEOUT", "180"))
LONGEST_FIRST = ("test_graphs.py", "test_models.py", "test_behaviour.py", "test_fuzz.py")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: runs while no other test does")
    if os.environ.get(in_worker.VARIABLE) is None and WORKERS > 0:
        config.pluginmanager.register(Forwarding(), "fastna-gpu-forwarding")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if config.pluginmanager.hasplugin("timeout"):  # the workers keep the time, and their queue may be long
                item.add_marker(pytest.mark.timeout(0))
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


class Forwarding:
    """Hands tests to the workers, all at once but those that run alone, and reports what they answer."""

    def __init__(self) -> None:
        self.workers: Workers | None = None
        self.answers: dict[str, Future[Outcome]] = {}
        self.record = Record()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        ours = [item for item in session.items if HERE in item.path.parents]
        if session.config.option.collectonly or not ours:
            return
        self.workers = Workers(WORKERS, TIME_LIMIT, in_worker.is_usable)
        rank = {name: position for position, name in enumerate(LONGEST_FIRST)}
        for item in sorted(ours, key=lambda item: rank.get(item.path.name, len(rank))):
            if item.get_closest_marker("alone") is None:
                self.answers[item.nodeid] = self.workers.submit(in_worker.run_test, item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self.workers is None or HERE not in item.path.parents:
            return None
        future = self.answers.get(item.nodeid) or self.workers.submit(in_worker.run_test, item.nodeid)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        began = time.time()
        try:
            outcome = future.result()
        except WorkerError as error:
            outcome = Outcome("failed", str(error), time.time() - began)
        self.record.add(item.nodeid, outcome)
        path, line, _ = item.location
        reason = (
            (path, line or 0, outcome.message) if outcome.status == "skipped" else outcome.details or outcome.message
        )
        report = pytest.TestReport(
            item.nodeid, item.location, dict(item.keywords), outcome.status, reason, "call", duration=outcome.seconds
        )
        item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        if self.workers is not None:
            self.workers.close()
            if path := os.environ.get("FASTNA_GPU_RECORD"):
                self.record.write(Path(path))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.record.outcomes:
            terminalreporter.section("GPU suite")
            terminalreporter.write_line(self.record.summary())


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 is exact unless a test allows TF32."""
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu needs a CUDA device, and PyTorch sees none")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
