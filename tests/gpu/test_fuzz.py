"""Two thousand random calls, forward and backward, over naive, gemm and fused, against float64.

FASTNA_GPU_FUZZ is the number of configurations, of 20 calls each. A failure prints its seed;
`workers.check_configuration(seed)` repeats it.
"""

from __future__ import annotations

import os
from concurrent.futures import Future

import pytest
from workers import CALLS, check_configuration, run_check

CONFIGURATIONS = int(os.environ.get("FASTNA_GPU_FUZZ", "100"))


@pytest.fixture(scope="module")
def checks(pool) -> list[Future[list[str]]]:
    """All configurations under way; they finish in any order."""
    return [pool.submit(run_check, check_configuration, seed) for seed in range(CONFIGURATIONS)]


def test_there_are_two_thousand_calls():
    assert "FASTNA_GPU_FUZZ" in os.environ or CONFIGURATIONS * CALLS >= 2000


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_random_calls_agree_with_float64(checks, seed):
    failures = checks[seed].result()
    assert not failures, "\n".join(failures)
