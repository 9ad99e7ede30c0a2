"""Two thousand random calls, forward and backward, over naive, gemm and fused, against float64.

FASTNA_GPU_FUZZ is the number of configurations, of 20 calls each. A failure prints its seed;
`fuzz_worker.check_configuration(seed)` repeats it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from fuzz_worker import CALLS, check_configuration

CONFIGURATIONS = int(os.environ.get("FASTNA_GPU_FUZZ", "100"))
WORKERS = min(os.cpu_count() or 1, 12)


@pytest.fixture(scope="module")
def checks() -> Iterator[list[Future[list[str]]]]:
    """All configurations under way; they finish in any order."""
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield [pool.submit(check_configuration, seed) for seed in range(CONFIGURATIONS)]
        pool.shutdown(wait=True, cancel_futures=True)


def test_there_are_two_thousand_calls():
    assert "FASTNA_GPU_FUZZ" in os.environ or CONFIGURATIONS * CALLS >= 2000


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_random_calls_agree_with_float64(checks, seed):
    failures = checks[seed].result()
    assert not failures, "\n".join(failures)
