"""Every primitive on the GPU: the same checks as under the emulator, so that the emulator's word counts."""

from __future__ import annotations

import primitive_checks as checks
import pytest
import torch
from probes import include_probes


@pytest.fixture(autouse=True)
def _probes(monkeypatch):
    include_probes(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_nearest_even(cuda, dtype):
    checks.check_rounding(cuda, dtype)


def test_approximate_functions(cuda):
    checks.check_functions(cuda)


def test_shuffles_and_votes(cuda):
    checks.check_warp(cuda)


def test_matrix_loads_and_transposition(cuda):
    checks.check_matrices(cuda)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matrix_products(cuda, dtype):
    checks.check_mma(cuda, dtype)


def test_matrix_products_of_half_the_depth(cuda):
    checks.check_mma(cuda, torch.bfloat16, half_depth=True)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("chunks", [64, 300])
def test_asynchronous_copies(cuda, size, chunks):
    checks.check_copies(cuda, size, chunks)


def test_named_barriers(cuda):
    checks.check_barriers(cuda)


def test_vector_access(cuda):
    checks.check_vectors(cuda)


def test_window_arithmetic(cuda):
    for axis in checks.AXES:
        checks.check_windows(cuda, axis)
