"""The GEMM kernels' sources, run on the CPU, against the reference in float64: forward and every gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from emulator import EmulatorRuntime
from hypothesis import given
from hypothesis import strategies as st
from materialised import (
    TF32_TOLERANCE,
    Case,
    assert_equals_reference,
    assert_repeats,
    case_named,
    every_case,
)

from kernels.cuda import gemm
from kernels.problem import Axis

pytestmark = pytest.mark.usefixtures("emulator")


@every_case
def test_equals_reference(case: Case) -> None:
    assert_equals_reference(case, "gemm")


WIDE = Case("wide", (9, 9), (3, 4), heads=2, head_dim=196, value_dim=136, additional=66, rpb=True)


def test_more_channels_than_a_block_sums_and_than_stay_in_shared_memory() -> None:
    """Channels in two parts, queries streamed, several tiles, more additional keys than a tile has."""
    assert_equals_reference(WIDE, "gemm")


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("label", ["2d_seven", "3d_ragged_dilation"])
def test_tf32_where_pytorch_allows_it(label: str) -> None:
    case = dataclasses.replace(case_named(label), dtype=torch.float32)
    assert_equals_reference(case, "gemm", TF32_TOLERANCE)
    with pytest.raises(AssertionError, match="output"):
        assert_equals_reference(case, "gemm")


@pytest.mark.parametrize("label", ["2d_mixed_axes", "1d_even_window"])
def test_repeats_bit_for_bit(label: str) -> None:
    assert_repeats(case_named(label), "gemm")


# One chunk of channels and three runs of keys: the next run's keys are described while the last one's are still read.
MANY_RUNS = Case("many_runs", (11, 13), (11, 12), torch.bfloat16)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_holds_whenever_copies_land(seed: int, emulator: EmulatorRuntime) -> None:
    """Asynchronous copies land at other moments and warps run in another order."""
    emulator.seed = seed
    assert_equals_reference(MANY_RUNS, "gemm")


@given(
    axes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=3),
    dilation=st.integers(1, 4),
)
def test_tiles_cover_every_group(axes: list[tuple[int, int]], dilation: int) -> None:
    described = tuple(Axis(max(length, window * dilation), window, dilation) for length, window in axes)
    shape = gemm.tile_shape(described)
    assert 1 <= math.prod(shape) <= gemm.TILE
    assert all(1 <= size <= axis.group_length(0) for size, axis in zip(shape, described, strict=True))


def test_tiles_fit_the_window() -> None:
    """Square where windows are, flat where an axis is short; 56 queries meet exactly two runs of keys."""
    assert gemm.tile_shape((Axis(128, 13), Axis(128, 13))) == (8, 8)
    assert gemm.tile_shape((Axis(7, 7), Axis(7, 7))) == (7, 7)
    assert gemm.tile_shape((Axis(1, 1), Axis(4096, 9))) == (1, 56)
