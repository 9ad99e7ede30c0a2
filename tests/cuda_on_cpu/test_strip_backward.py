"""The strip backward kernel's source, run on the CPU, against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulator import EmulatorRuntime, guarded, guarded_allocations
from torch import Tensor

from kernels import backend
from kernels.backend import Gradients, Operands
from kernels.cuda import runtime, strip_backward
from kernels.cuda.strip_backward import Tile
from kernels.problem import Axis, Problem
from kernels.reference import Reference

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_problem(
    space: tuple[int, int],
    window: tuple[int, int],
    *,
    dilation: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 1,
    head_dim: int = 32,
    batch: int = 1,
    rpb_dtype: torch.dtype | None = torch.float32,
) -> Problem:
    return Problem(
        batch=batch,
        axes=tuple(Axis(*axis) for axis in zip(space, window, dilation, strict=True)),
        heads=heads,
        key_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
        rpb_dtype=rpb_dtype,
    )


@dataclasses.dataclass
class Call:
    """Everything that a backward pass takes, and the gradients expected of it."""

    problem: Problem
    operands: Operands
    output: Tensor
    lse: Tensor
    grad_output: Tensor
    grad_lse: Tensor | None
    expected: Gradients

    def run(self, needs_rpb_grad: bool = True) -> Gradients:
        with guarded_allocations():
            return backend.backward(
                strip_backward,
                self.problem,
                self.operands,
                self.output,
                self.lse,
                self.grad_output,
                self.grad_lse,
                needs_rpb_grad,
            )


def make_call(problem: Problem, *, packed: bool = False, with_grad_lse: bool = False) -> Call:
    generator = torch.Generator().manual_seed(problem.tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (problem.batch, *problem.space, problem.heads, problem.head_dim)
    if packed:
        query, key, value = guarded(normal(*shape[:3], 3, *shape[3:]).to(problem.dtype)).unbind(-3)
    else:
        query, key, value = (guarded(normal(*shape).to(problem.dtype)) for _ in range(3))
    rpb = None if problem.rpb_dtype is None else guarded(normal(*problem.rpb_shape).to(problem.rpb_dtype))
    operands = Operands(query, key, value, rpb)
    grad_output = guarded(normal(*shape).to(problem.dtype))
    grad_lse = guarded(normal(*shape[:-1])) if with_grad_lse else None

    exact = dataclasses.replace(problem, dtype=torch.float64, rpb_dtype=None if rpb is None else torch.float64)
    doubles = Operands(*(None if tensor is None else tensor.double() for tensor in dataclasses.astuple(operands)))
    output, lse = Reference().forward(exact, doubles)
    expected = Reference().backward(
        exact,
        doubles,
        output,
        lse,
        grad_output.double(),
        None if grad_lse is None else grad_lse.double(),
        rpb is not None,
    )
    return Call(
        problem, operands, guarded(output.to(problem.dtype)), guarded(lse.float()), grad_output, grad_lse, expected
    )


def assert_gradients(call: Call, needs_rpb_grad: bool = True) -> None:
    assert strip_backward.why_not(call.problem) is None
    gradients = call.run(needs_rpb_grad)
    tolerance = TOLERANCE[call.problem.dtype]
    for name in ("query", "key", "value"):
        gradient, expected = getattr(gradients, name), getattr(call.expected, name)
        assert gradient.dtype == call.problem.dtype
        assert gradient.is_contiguous()
        error = gradient.double() - expected
        assert error.norm() / expected.norm() < tolerance, name
        # Per token: one wrong row of a large map must not hide.
        worst = error.norm(dim=-1) / expected.norm(dim=-1).clamp(min=0.3 * float(expected.norm(dim=-1).mean()))
        assert worst.max() < 5 * tolerance, f"{name} at {(worst == worst.max()).nonzero()[:3]}"
    if call.operands.rpb is None or not needs_rpb_grad:
        assert gradients.rpb is None
    else:
        assert gradients.rpb.dtype == call.problem.rpb_dtype
        error = gradients.rpb.double() - call.expected.rpb
        assert error.norm() / call.expected.rpb.norm() < tolerance
        assert error.abs().max() < 5 * tolerance * call.expected.rpb.abs().max()


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch):
    """Makes the family cut maps as the test says."""

    def use(tile: Tile) -> None:
        monkeypatch.setattr(strip_backward, "choose_tile", lambda problem, needs_rpb_grad, device: tile)
        strip_backward._prepared.cache_clear()

    yield use
    strip_backward._prepared.cache_clear()


@pytest.mark.parametrize(
    ("space", "window", "dilation"),
    [
        ((15, 14), (7, 7), (1, 1)),  # ragged steps and pairs; keys of 10 query columns
        ((7, 7), (7, 7), (1, 1)),  # fewer columns than a product has
        ((9, 8), (7, 7), (1, 1)),
        ((17, 15), (7, 7), (2, 2)),  # groups of different lengths
        ((9, 11), (2, 6), (1, 1)),
        ((11, 10), (6, 8), (1, 1)),  # queries of 9 key columns
        ((12, 9), (8, 4), (1, 2)),
        ((3, 12), (1, 2), (1, 1)),
    ],
)
def test_borders_windows_and_dilation(
    emulator: EmulatorRuntime, space: tuple[int, int], window: tuple[int, int], dilation: tuple[int, int]
) -> None:
    assert_gradients(make_call(make_problem(space, window, dilation=dilation)))


@pytest.mark.parametrize("width", range(8, 16))
def test_every_width(emulator: EmulatorRuntime, width: int) -> None:
    assert_gradients(make_call(make_problem((8, width), (7, 7))))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "tile"),
    [
        (30, 9, Tile(tiles=1, step_rows=8, warps=4, blocks=1)),  # the ring goes round
        (23, 26, Tile(tiles=3, step_rows=7, warps=3, blocks=1)),  # halos on both sides
        (26, 13, Tile(tiles=2, step_rows=5, warps=2, blocks=1, chunks=2)),
    ],
)
def test_walks(emulator: EmulatorRuntime, cut, rows: int, columns: int, tile: Tile, ahead: bool) -> None:
    cut(dataclasses.replace(tile, ahead=ahead))
    assert_gradients(make_call(make_problem((rows, columns), (7, 7))))


@pytest.mark.parametrize("window", [(3, 3), (5, 5)])
def test_smaller_windows(emulator: EmulatorRuntime, cut, window: tuple[int, int]) -> None:
    cut(Tile(tiles=2, step_rows=8, warps=2, blocks=1))
    assert_gradients(make_call(make_problem((11, 17), window)))


def test_tall_windows_without_bias(emulator: EmulatorRuntime) -> None:
    assert_gradients(make_call(make_problem((20, 9), (9, 5), rpb_dtype=None)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rpb_dtype", [None, torch.float16, torch.bfloat16])
def test_dtypes_packed_qkv_and_lse(
    emulator: EmulatorRuntime, dtype: torch.dtype, rpb_dtype: torch.dtype | None
) -> None:
    problem = make_problem((9, 10), (7, 7), dtype=dtype, rpb_dtype=rpb_dtype, batch=2, heads=2)
    assert_gradients(make_call(problem, packed=True, with_grad_lse=True))


def test_wide_heads(emulator: EmulatorRuntime) -> None:
    assert_gradients(make_call(make_problem((14, 9), (7, 7), head_dim=64, heads=2)))


def test_bias_gradient_nobody_asked_for(emulator: EmulatorRuntime) -> None:
    assert_gradients(make_call(make_problem((9, 10), (7, 7))), needs_rpb_grad=False)


def test_any_strides_of_grad_output(emulator: EmulatorRuntime) -> None:
    call = make_call(make_problem((8, 9), (5, 5), heads=2, batch=2))
    transposed = guarded(call.grad_output.transpose(0, 3).contiguous()).transpose(0, 3)
    assert not transposed.is_contiguous()
    assert_gradients(dataclasses.replace(call, grad_output=transposed))


def test_same_bits_twice(emulator: EmulatorRuntime) -> None:
    call = make_call(make_problem((9, 10), (7, 7), batch=2))
    first, second = call.run(), call.run()
    for name in ("query", "key", "value", "rpb"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("length", [7, 14, 15, 20, 28, 56, 200])
def test_tiles_fit_every_device(shared_memory: int, head_dim: int, length: int) -> None:
    device = runtime.DeviceProperties((8, 0), 108, shared_memory)
    for window in {1, 2, min(8, length), 7}:
        problem = make_problem((length, length), (window, window), head_dim=head_dim, batch=64)
        tile = strip_backward.choose_tile(problem, True, device)
        if tile is None:
            assert (head_dim, shared_memory) == (64, 99 << 10)
            continue
        plan = strip_backward.plan(problem, tile, True)
        assert plan.shared_bytes <= shared_memory
        assert plan.tiles * plan.tile_columns >= length
        assert plan.chunks * plan.chunk_rows >= length
        candidates = strip_backward.candidate_tiles(problem, True, device)
        assert candidates[0] == tile
        assert len(candidates) <= 4
        assert all(strip_backward.plan(problem, other, True).shared_bytes <= shared_memory for other in candidates)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float32}, "float16"),
        ({"axes": (Axis(20, 7), Axis(20, 9))}, "window"),
        ({"axes": (Axis(20, 9), Axis(20, 7))}, "bias"),
        ({"axes": (Axis(20, 7, causal=True), Axis(20, 7))}, "causal"),
        ({"axes": (Axis(20, 7, stride=2), Axis(20, 7))}, "stride"),
        ({"axes": (Axis(20, 7),)}, "rank 1"),
        ({"head_dim": 40, "value_dim": 40}, "head dims"),
        ({"heads": 4, "key_heads": 2}, "grouped"),
        ({"additional": 3}, "additional"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_refusals_say_why(change: dict[str, object], word: str) -> None:
    reason = strip_backward.why_not(dataclasses.replace(make_problem((20, 20), (7, 7)), **change))
    assert reason is not None
    assert word in reason
