"""The forward kernel of hopper_strip, run on the CPU, against the reference in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from emulator import EmulatorRuntime
from test_strip_forward import TOLERANCE, make_operands, make_problem

from kernels import backend
from kernels.backend import Operands
from kernels.cuda import block, fused, hopper_strip, strip, strip_walks
from kernels.cuda.dry import HOPPER, DryRuntime
from kernels.cuda.runtime import use_runtime
from kernels.problem import Axis, Problem
from kernels.reference import Reference


def assert_forward(problem: Problem, operands: Operands) -> None:
    assert strip_walks.why_no_shape(problem) is None
    assert hopper_strip.why_no_rows(problem) is None
    assert hopper_strip.why_not_operands(problem, operands) is None
    output, lse = backend.forward(hopper_strip, problem, operands)
    exact = dataclasses.replace(problem, dtype=torch.float64, rpb_dtype=None if operands.rpb is None else torch.float64)
    doubles = Operands(*(None if t is None else t.double() for t in dataclasses.astuple(operands)))
    expected, expected_lse = Reference().forward(exact, doubles)
    assert output.dtype == problem.dtype
    assert output.is_contiguous()
    # Per query: one wrong row in a large map must not hide.
    error = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 4 * TOLERANCE[problem.dtype], f"at {error.isnan().nonzero()[:5]}, {error.argmax()}"
    assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[problem.dtype]
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-3)


def check_large_scores(dtype: torch.dtype) -> None:
    """Windows whose largest score is far above those that weights are first measured by."""
    problem = make_problem((14, 14), (7, 7), heads=1, dtype=dtype)
    operands = make_operands(problem)
    assert_forward(problem, dataclasses.replace(operands, query=operands.query * (8 if dtype == torch.float16 else 32)))


@pytest.mark.parametrize(
    "space", [(14, 14), (8, 16), (24, 12), (16, 28), (21, 22), (12, 8), (13, 7), (9, 14), (15, 14)]
)
def test_borders(emulator: EmulatorRuntime, space: tuple[int, int]) -> None:
    problem = make_problem(space, (7, 7))
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize("window", [(3, 3), (5, 5), (7, 3), (3, 7), (5, 7)])
def test_windows(emulator: EmulatorRuntime, window: tuple[int, int]) -> None:
    problem = make_problem((12, 15), window, heads=1)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize(
    ("space", "window", "dtype"),
    [
        ((12, 12), (11, 11), torch.bfloat16),
        ((28, 30), (11, 11), torch.float16),  # the last two steps differ
        ((24, 17), (9, 13), torch.bfloat16),
        ((13, 24), (13, 7), torch.bfloat16),
        ((9, 14), (5, 11), torch.float16),
        ((16, 15), (11, 13), torch.bfloat16),  # as many registers as seven warps have
    ],
)
def test_wide_windows(
    emulator: EmulatorRuntime, space: tuple[int, int], window: tuple[int, int], dtype: torch.dtype
) -> None:
    problem = make_problem(space, window, heads=1, dtype=dtype)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize(
    ("axes", "packed"),
    [
        ((Axis(24, 11, 2), Axis(36, 11, 3)), True),
        ((Axis(16, 7, 2), Axis(24, 7)), False),
        ((Axis(9, 5), Axis(56, 7, 8)), False),
        ((Axis(33, 9, 2), Axis(38, 11, 3)), True),  # lengths that differ by one, and of rows in steps
        ((Axis(23, 11, 2), Axis(23, 13, 1)), False),  # seven warps
    ],
)
def test_dilation_groups_are_maps(emulator: EmulatorRuntime, axes: tuple[Axis, Axis], packed: bool) -> None:
    sizes = [axis.length for axis in axes], [axis.window for axis in axes]
    problem = dataclasses.replace(make_problem(*map(tuple, sizes), batch=2), axes=axes)
    assert_forward(problem, make_operands(problem, packed=packed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rpb_dtype", [None, torch.float32, torch.bfloat16])
def test_dtypes_and_packed_qkv(emulator: EmulatorRuntime, dtype: torch.dtype, rpb_dtype: torch.dtype | None) -> None:
    if (dtype, rpb_dtype) == (torch.float16, torch.bfloat16):
        rpb_dtype = torch.float16
    problem = make_problem((12, 14), (7, 7), dtype=dtype, rpb_dtype=rpb_dtype, batch=2, heads=3)
    assert_forward(problem, make_operands(problem, packed=True))


@pytest.mark.parametrize(
    ("space", "window", "head_dim"), [((24, 27), (13, 13), 64), ((20, 16), (11, 7), 32), ((12, 30), (9, 13), 32)]
)
def test_wide_windows_without_a_bias(
    emulator: EmulatorRuntime, space: tuple[int, int], window: tuple[int, int], head_dim: int
) -> None:
    """Whose columns are all alike: their table is one line."""
    problem = make_problem(space, window, heads=1, head_dim=head_dim, rpb_dtype=None)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize("width", [14, 30])  # one strip; two
def test_wide_heads(emulator: EmulatorRuntime, width: int) -> None:
    problem = make_problem((12, width), (7, 7), head_dim=64)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize("multiprocessors", [1, 3, 4])
def test_walks_one_after_another(multiprocessors: int) -> None:
    """More heads than SMs; blocks with different numbers of walks; a ring that goes round many times."""
    with use_runtime("cpu", EmulatorRuntime(2, multiprocessors=multiprocessors)):
        problem = make_problem((14, 14), (7, 7), batch=5)
        assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize("multiprocessors", [2, 5])
def test_several_strips(multiprocessors: int) -> None:
    """Two of 28 columns; the last one narrower than the others."""
    with use_runtime("cpu", EmulatorRuntime(3, multiprocessors=multiprocessors)):
        for width in (56, 37):
            problem = make_problem((14, width), (7, 7), batch=3, heads=1)
            assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize("batch", [8, 9])
def test_maps_side_by_side(batch: int) -> None:
    with use_runtime("cpu", EmulatorRuntime(4, multiprocessors=2)):
        for width in (14, 8):
            problem = make_problem((14, width), (7, 7), batch=batch)
            strip = hopper_strip.choose_strip(problem, dataclasses.replace(HOPPER, multiprocessors=2))
            assert strip is not None
            assert strip.maps == 32 // width
            assert_forward(problem, make_operands(problem))


def test_dilation_groups_do_not_lie_side_by_side() -> None:
    """Nor do they where rows are dilated and columns are not."""
    for axes in ((Axis(28, 7, 2), Axis(14, 7)), (Axis(14, 7), Axis(28, 7, 2))):
        problem = dataclasses.replace(make_problem((14, 14), (7, 7), batch=512), axes=axes)
        strip = hopper_strip.choose_strip(problem, HOPPER)
        assert strip is not None
        assert strip.maps == 1


def test_nothing_outside_the_map_is_seen(emulator: EmulatorRuntime) -> None:
    problem = make_problem((14, 12), (7, 7), batch=2)

    def amid_nan(tensor: torch.Tensor) -> torch.Tensor:
        around = torch.full((4, 18, 20, 3, 32), float("nan"), dtype=tensor.dtype)
        view = around[1:3, 2:16, 4:16, :2]
        return view.copy_(tensor)

    query, key, value, rpb, *_ = make_operands(problem).tensors
    assert query is not None
    assert key is not None
    assert value is not None
    assert_forward(problem, Operands(*map(amid_nan, (query, key, value)), rpb))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores(emulator: EmulatorRuntime, dtype: torch.dtype) -> None:
    check_large_scores(dtype)


def test_no_races() -> None:
    with use_runtime("cpu", EmulatorRuntime(4, multiprocessors=2, watches_races=True)):
        problem = make_problem((14, 14), (7, 7), batch=2)
        operands = make_operands(problem)
        assert_forward(problem, operands)
        first, second = (backend.forward(hopper_strip, problem, operands) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the same bits every time"


def test_lengths_that_row_blocks_cover() -> None:
    """All keys that 8 rows of queries see lie in their two row blocks, or three."""
    for window in strip_walks.WINDOWS:
        above, rows = (window // 2, 16) if window < 8 else (8, 24)
        for length in range(window, 80):
            axis = Axis(length, window)
            covered = all(
                first - above <= begin and end <= first + rows - above
                for first in range(0, length, 8)
                for begin, end in (axis.window_at(t, length) for t in range(length)[first : first + 8])
            )
            assert hopper_strip.suits(length, window) == covered, (length, window)


def test_strips_hold_what_their_queries_see() -> None:
    """All that two neighbouring columns of queries see, and one column more, lies in a row block of their strip."""
    for window, head_dim in itertools.product(strip_walks.WINDOWS, (32, 64)):
        for length in range(window, 140):
            problem = make_problem((16, length), (window, window), head_dim=head_dim, batch=128)
            strip = hopper_strip.choose_strip(problem, HOPPER)
            if strip is None:
                continue
            axis = Axis(length, window)
            for column in range(0, length, 2):
                first = column // strip.columns * strip.columns - window // 2
                begins = [axis.window_at(min(column + i, length - 1), length)[0] - first for i in (0, 1)]
                assert 0 <= begins[0] <= begins[1] <= begins[0] + 1
                assert begins[0] + window + 1 <= strip.columns + window - 1


@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "batch", "family"),
    [
        (56, 2, 32, 128, hopper_strip),
        (28, 4, 32, 128, hopper_strip),
        (14, 8, 32, 128, hopper_strip),
        (14, 12, 64, 128, hopper_strip),
        (7, 16, 32, 128, block),
        (56, 2, 32, 1, strip),  # few walks
        (56, 2, 32, 40, strip),  # two rounds, the second one short
        (57, 2, 32, 128, strip),  # one token in the last tile
    ],
)
def test_who_serves(length: int, heads: int, head_dim: int, batch: int, family: object) -> None:
    problem = make_problem((length, length), (7, 7), heads=heads, head_dim=head_dim, batch=batch)
    with use_runtime("cpu", DryRuntime()):
        assert fused.forward_families.__wrapped__(problem)[0] is family
        if family is hopper_strip:
            chosen, other = hopper_strip.candidate_strips(problem, HOPPER)
            assert chosen == hopper_strip.choose_strip(problem, HOPPER) != other
            assert hopper_strip.shared_bytes(problem, chosen) <= HOPPER.shared_memory
            grid = strip_walks.walks_of(problem, chosen.columns, chosen.maps, HOPPER).grid
            assert 0.9 * HOPPER.multiprocessors < grid <= HOPPER.multiprocessors


@pytest.mark.parametrize("head_dim", [32, 64])
def test_other_numbers_of_warps(emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    monkeypatch.setattr(hopper_strip, "WARPS", hopper_strip.OTHER_WARPS[head_dim])
    problem = make_problem((20, 14), (7, 7), head_dim=head_dim, batch=2)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float32}, "float16"),
        ({"axes": (Axis(24, 15), Axis(24, 7))}, "windows"),
        ({"axes": (Axis(24, 6), Axis(24, 7))}, "windows"),
        ({"axes": (Axis(24, 7, causal=True), Axis(24, 7))}, "causal"),
        ({"axes": (Axis(24, 7, stride=2), Axis(24, 7))}, "stride"),
        ({"axes": (Axis(51, 7, dilation=2), Axis(24, 7))}, "last 2 of 26"),
        ({"axes": (Axis(24, 7), Axis(144, 7, dilation=12))}, "dilation"),
        ({"axes": (Axis(26, 7), Axis(24, 7))}, "last 2 of 26"),
        ({"axes": (Axis(24, 7),)}, "rank 1"),
        ({"head_dim": 128, "value_dim": 128}, "head_dim"),
        ({"key_heads": 1}, "key head"),
        ({"additional": 3}, "additional"),
        ({"scale": 0.0}, "scale"),
        ({"batch": 1}, "walks"),
    ],
)
def test_refusals_say_why(emulator: EmulatorRuntime, change: dict[str, object], word: str) -> None:
    problem = make_problem((24, 24), (7, 7), batch=4)
    assert hopper_strip.why_not(problem) is None
    reason = hopper_strip.why_not(dataclasses.replace(problem, **change))
    assert reason is not None
    assert word in reason
