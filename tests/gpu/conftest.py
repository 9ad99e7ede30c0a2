"""Tests in this folder need an NVIDIA GPU: `make test-gpu`, or `python3 -m pytest -m gpu tests/gpu`.

They need PyTorch, CuPy, NumPy and pytest, and the model tests timm; nothing of the training stack.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cuda_on_cpu")]
os.environ.setdefault("FASTNA_CACHE_DIR", str(Path(tempfile.gettempdir()) / "fastna-gpu-tests"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def exact_float32():
    """float32 is exact unless a test allows TF32."""
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu needs a CUDA device, and PyTorch sees none")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes with CUDA contexts of their own, for what is in workers.py."""
    count = min(os.cpu_count() or 1, 12)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
        pool.shutdown(wait=True, cancel_futures=True)
