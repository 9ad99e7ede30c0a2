"""The strip kernel's source, run on the CPU, against the reference in float64."""

from __future__ import annotations

import dataclasses
import struct

import pytest
import torch
from emulator import EmulatorRuntime, guarded

from kernels import backend
from kernels.backend import Operands
from kernels.cuda import strip
from kernels.cuda.runtime import DeviceProperties
from kernels.problem import Axis, Problem
from kernels.reference import Reference

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_problem(
    space: tuple[int, int],
    window: tuple[int, int],
    *,
    dilation: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 2,
    key_heads: int | None = None,
    head_dim: int = 32,
    batch: int = 1,
    rpb_dtype: torch.dtype | None = torch.float32,
) -> Problem:
    return Problem(
        batch=batch,
        axes=tuple(Axis(*axis) for axis in zip(space, window, dilation, strict=True)),
        heads=heads,
        key_heads=key_heads or heads,
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
        rpb_dtype=rpb_dtype,
    )


def make_operands(problem: Problem, *, packed: bool = False) -> Operands:
    torch.manual_seed(problem.tokens)
    shape = (problem.batch, *problem.space)
    if packed:
        qkv = guarded(torch.randn(*shape, 3, problem.heads, problem.head_dim).to(problem.dtype))
        query, key, value = qkv.unbind(-3)
    else:
        query = guarded(torch.randn(*shape, problem.heads, problem.head_dim).to(problem.dtype))
        key, value = (
            guarded(torch.randn(*shape, problem.key_heads, problem.head_dim).to(problem.dtype)) for _ in range(2)
        )
    rpb = None if problem.rpb_dtype is None else guarded(torch.randn(problem.rpb_shape).to(problem.rpb_dtype))
    return Operands(query, key, value, rpb)


def assert_forward(problem: Problem, operands: Operands) -> None:
    assert strip.why_not(problem) is None
    output, lse = backend.forward(strip, problem, operands)
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


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles along a row of a small map."""
    monkeypatch.setattr(strip, "choose_tile", lambda problem, device: strip.Tile(columns=6, warps=2))
    strip._prepared.cache_clear()
    yield
    strip._prepared.cache_clear()


@pytest.mark.parametrize(
    ("space", "window", "dilation"),
    [
        ((17, 15), (7, 7), (1, 1)),  # an interior strip; ragged rows and columns
        ((14, 14), (7, 7), (1, 1)),
        ((7, 7), (7, 7), (1, 1)),  # fewer columns than a product has keys
        ((19, 16), (7, 7), (2, 2)),  # groups of different lengths
        ((9, 11), (2, 6), (1, 1)),
        ((10, 9), (9, 4), (1, 2)),
        ((3, 12), (1, 1), (1, 1)),
    ],
)
def test_borders_windows_and_dilation(
    emulator: EmulatorRuntime, space: tuple[int, int], window: tuple[int, int], dilation: tuple[int, int]
) -> None:
    problem = make_problem(space, window, dilation=dilation)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize("width", [13, 16, 20])
def test_several_tiles_in_a_row(emulator: EmulatorRuntime, small_tiles: None, width: int) -> None:
    problem = make_problem((9, width), (7, 7), heads=1)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize("window", [(3, 3), (5, 5)])
def test_windows_smaller_than_a_product(emulator: EmulatorRuntime, small_tiles: None, window: tuple[int, int]) -> None:
    problem = make_problem((11, 17), window, heads=1)
    assert_forward(problem, make_operands(problem))


@pytest.mark.parametrize(("columns", "warps"), [(8, 3), (4, 3)])  # more and fewer pairs of columns than warps
def test_two_blocks_of_rows(
    emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, columns: int, warps: int
) -> None:
    tile = strip.Tile(columns=columns, row_blocks=2, warps=warps)
    monkeypatch.setattr(strip, "choose_tile", lambda problem, device: tile)
    strip._prepared.cache_clear()
    try:
        for rows in (14, 21, 24):
            problem = make_problem((rows, 9), (7, 7), heads=1)
            assert_forward(problem, make_operands(problem))
    finally:
        strip._prepared.cache_clear()


def test_tiles_fit_and_small_maps_are_whole() -> None:
    device = DeviceProperties(capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
    for length, heads, head_dim in ((56, 2, 32), (28, 4, 32), (14, 8, 32), (14, 12, 64), (200, 1, 64)):
        problem = make_problem((length, length), (7, 7), heads=heads, head_dim=head_dim, batch=128)
        tiles = strip.candidate_tiles(problem, device)
        assert tiles[0] == strip.choose_tile(problem, device)
        assert len(tiles) == len(set(tiles)) <= 4
        assert all(strip.plan(problem, tile).shared_bytes <= device.shared_memory for tile in tiles)
        assert tiles[0].row_blocks == (2 if length == 14 else 1)
        alone = dataclasses.replace(problem, batch=1)
        assert strip.choose_tile(alone, device).row_blocks == 1, "one image leaves SMs idle in larger tiles"


def test_divisors_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = [0, 1, 2**31 - 1, *torch.randint(2**31, (200,), generator=generator).tolist()]
    for divisor in [*range(1, 70), 2**16 + 1, 2**30 - 1, 2**30 + 1, 2**31 - 1]:
        _, multiplier, shift = struct.unpack("<IIi", strip._pack_divisor(divisor))
        near = [divisor * (number // divisor) + offset for number in numbers for offset in (-1, 0)]
        for number in [*numbers, *(n for n in near if n >= 0)]:
            assert number * multiplier >> shift == number // divisor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rpb_dtype", [None, torch.float16, torch.bfloat16])
def test_dtypes_and_packed_qkv(emulator: EmulatorRuntime, dtype: torch.dtype, rpb_dtype: torch.dtype | None) -> None:
    problem = make_problem((9, 10), (7, 7), dtype=dtype, rpb_dtype=rpb_dtype, batch=2)
    assert_forward(problem, make_operands(problem, packed=True))


def test_shared_key_heads_and_wide_heads(emulator: EmulatorRuntime) -> None:
    problem = make_problem((9, 10), (7, 7), heads=4, key_heads=2, head_dim=64)
    assert_forward(problem, make_operands(problem))


def test_misaligned_views_are_left_to_others() -> None:
    problem = make_problem((8, 9), (5, 5), rpb_dtype=None)
    operands = make_operands(problem)
    shifted = torch.empty(operands.query.numel() + 1, dtype=problem.dtype)[1:].view_as(operands.query)
    assert strip.why_not_operands(problem, operands) is None
    reason = strip.why_not_operands(problem, dataclasses.replace(operands, query=shifted))
    assert reason is not None
    assert "query at address" in reason
    assert "not aligned to 16 bytes" in reason


def test_same_bits_twice(emulator: EmulatorRuntime) -> None:
    problem = make_problem((9, 10), (7, 7))
    operands = make_operands(problem)
    first, second = backend.forward(strip, problem, operands), backend.forward(strip, problem, operands)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float32}, "float16"),
        ({"axes": (Axis(20, 13), Axis(20, 13))}, "window"),
        ({"axes": (Axis(20, 7, causal=True), Axis(20, 7))}, "causal"),
        ({"axes": (Axis(20, 7, stride=2), Axis(20, 7))}, "stride"),
        ({"axes": (Axis(20, 7),)}, "rank 1"),
        ({"head_dim": 40, "value_dim": 40}, "head dims"),
        ({"additional": 3}, "additional"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_refusals_say_why(change: dict[str, object], word: str) -> None:
    reason = strip.why_not(dataclasses.replace(make_problem((20, 20), (7, 7)), **change))
    assert reason is not None
    assert word in reason
