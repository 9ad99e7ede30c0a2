"""The published operators' answers (tests/golden/na_vectors.*), given by every CUDA backend."""

from __future__ import annotations

import itertools

import pytest
from random_problems import TOLERANCES
from workers import check_golden, run_check

CASES = list(itertools.product(range(16), TOLERANCES, ("naive", "gemm", "fused")))


@pytest.fixture(scope="module")
def checks(pool):
    """All cases under way."""
    return {case: pool.submit(run_check, check_golden, *case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_golden_vectors(checks, case):
    assert checks[case].result() == []
