"""Every primitive under the emulator. tests/gpu/test_primitives.py makes the same checks on a GPU."""

from __future__ import annotations

import primitive_checks as checks
import pytest
import torch

from kernels.problem import Axis

pytestmark = pytest.mark.usefixtures("emulator")
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_nearest_even(dtype):
    checks.check_rounding(CPU, dtype)


def test_approximate_functions():
    checks.check_functions(CPU)


def test_shuffles_and_votes():
    checks.check_warp(CPU)


def test_matrix_loads_and_transposition():
    checks.check_matrices(CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matrix_products(dtype):
    checks.check_mma(CPU, dtype)


def test_matrix_products_of_half_the_depth():
    checks.check_mma(CPU, torch.bfloat16, half_depth=True)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("chunks", [64, 300])
def test_asynchronous_copies(size, chunks):
    checks.check_copies(CPU, size, chunks)


def test_named_barriers():
    checks.check_barriers(CPU)


def test_vector_access():
    checks.check_vectors(CPU)


@pytest.mark.parametrize("axis", checks.AXES, ids=str)
def test_window_arithmetic(axis: Axis):
    checks.check_windows(CPU, axis)
