"""The hopper_ring backward kernel's source, run on the CPU, against the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_strip_backward
import torch
from emulator import EmulationError, EmulatorRuntime
from test_hopper_mutations import break_kernel
from test_strip_backward import assert_gradients, make_call, make_problem

from kernels.cuda import hopper_ring_backward, runtime
from kernels.cuda.hopper_ring_backward import Strip
from kernels.cuda.runtime import use_runtime
from kernels.problem import Axis


@pytest.fixture(autouse=True)
def _this_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_strip_backward, "strip_backward", hopper_ring_backward)


@pytest.mark.parametrize("space", [(14, 14), (8, 16), (24, 12), (16, 28), (21, 15)])
def test_borders(emulator: EmulatorRuntime, space: tuple[int, int]) -> None:
    assert_gradients(make_call(make_problem(space, (7, 7), batch=4)))


@pytest.mark.parametrize("window", [(3, 3), (5, 5), (7, 3), (3, 7), (5, 7)])
def test_windows(emulator: EmulatorRuntime, window: tuple[int, int]) -> None:
    assert_gradients(make_call(make_problem((15, 14), window, batch=4)))


@pytest.mark.parametrize(
    ("space", "window"),
    [
        ((12, 12), (11, 11)),
        ((14, 14), (11, 11)),
        ((24, 25), (11, 11)),
        ((13, 17), (13, 13)),
        ((16, 18), (9, 9)),
        ((28, 16), (11, 7)),
        ((9, 26), (3, 13)),
    ],
)
def test_wide_windows(emulator: EmulatorRuntime, space: tuple[int, int], window: tuple[int, int]) -> None:
    """Three row blocks in reach, several sweeps over columns, and two products for the bias gradient."""
    assert_gradients(make_call(make_problem(space, window, batch=4)))


@pytest.mark.parametrize(
    ("space", "window", "dilation"),
    [((24, 28), (11, 11), (2, 2)), ((48, 24), (7, 5), (6, 3)), ((13, 64), (9, 7), (1, 8))],
)
def test_dilation(
    emulator: EmulatorRuntime, space: tuple[int, int], window: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """Every dilation group is a map of its own."""
    problem = make_problem(space, window, dilation=dilation, heads=2, batch=2)
    assert_gradients(make_call(problem, packed=True, with_grad_lse=True))


def test_groups_of_different_lengths_are_refused() -> None:
    with use_runtime("cpu", EmulatorRuntime()):
        reason = hopper_ring_backward.why_not(make_problem((25, 24), (7, 7), dilation=(3, 3), batch=8))
    assert reason == "it takes dilations up to 8 that divide an axis, not (3, 3) of (25, 24)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rpb_dtype", [None, torch.float16])
def test_dtypes_packed_qkv_and_lse(
    emulator: EmulatorRuntime, dtype: torch.dtype, rpb_dtype: torch.dtype | None
) -> None:
    problem = make_problem((8, 14), (7, 7), dtype=dtype, rpb_dtype=rpb_dtype, batch=2, heads=2)
    assert_gradients(make_call(problem, packed=True, with_grad_lse=True))


def test_wide_heads(emulator: EmulatorRuntime) -> None:
    assert_gradients(make_call(make_problem((14, 14), (7, 7), head_dim=64, heads=2, batch=2)))


def test_bias_gradient_nobody_asked_for(emulator: EmulatorRuntime) -> None:
    assert_gradients(make_call(make_problem((14, 14), (7, 7), batch=4)), needs_rpb_grad=False)


@pytest.mark.parametrize(("slots", "warps"), [(3, 12), (4, 16), (5, 8)])
def test_walks(emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, slots: int, warps: int) -> None:
    """Several to a block, of strips of different widths, down rings that go round."""
    strip = Strip(columns=10, block_columns=17, slots=slots, warps=warps)
    monkeypatch.setattr(hopper_ring_backward, "choose_strip", lambda problem, needs_rpb_grad, device: strip)
    assert_gradients(make_call(make_problem((14, 28), (7, 7), batch=5)))


@pytest.mark.parametrize("multiprocessors", [2, 5])
def test_strips_dealt_to_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    """Of 5 maps' 15 strips; and a map's strips may not all be at work at once."""
    strip = Strip(columns=10, block_columns=17, slots=4, warps=12)
    monkeypatch.setattr(hopper_ring_backward, "choose_strip", lambda problem, needs_rpb_grad, device: strip)
    with use_runtime("cpu", EmulatorRuntime(2, multiprocessors=multiprocessors)):
        assert_gradients(make_call(make_problem((14, 28), (7, 7), batch=5)))


@pytest.mark.parametrize("length", [9, 10, 11])
def test_steps_that_begin_before_the_map(length: int) -> None:
    """What the first rows see then lies in the second of a step's row blocks, which may be the ring's first."""
    with use_runtime("cpu", EmulatorRuntime(2, multiprocessors=1)):
        assert_gradients(make_call(make_problem((length, 12), (7, 5), heads=1, batch=6)))


@pytest.mark.parametrize("window", [7, 9, 11])
def test_no_races(window: int) -> None:
    with use_runtime("cpu", EmulatorRuntime(4, multiprocessors=1, watches_races=True)):
        assert_gradients(make_call(make_problem((max(10, window), 14), (window, window), heads=1, batch=3)))


def test_same_bits_twice(emulator: EmulatorRuntime) -> None:
    call = make_call(make_problem((14, 14), (7, 7), batch=6))
    first, second = call.run(), call.run()
    for name in ("query", "key", "value", "rpb"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("length", [8, 14, 28, 56])
def test_row_blocks_fit(head_dim: int, length: int) -> None:
    device = runtime.DeviceProperties((9, 0), 132, 227 << 10)
    for window in (3, 5, 7, 9, 11):
        if window > length or (window > 7 and head_dim > 32):
            continue
        problem = make_problem((length, length), (window, window), head_dim=head_dim, batch=64)
        assert hopper_ring_backward.lift_of(Axis(length, window)) is not None
        strip = hopper_ring_backward.choose_strip(problem, True, device)
        assert strip is not None
        assert hopper_ring_backward.shared_bytes(problem, strip, True) <= device.shared_memory


MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "grad_output not waited for": [("barrier_wait(shared.full[at.slot], at.parity);       // grad", "// grad")],
    "statistics not waited for": [("    barrier_wait(shared.ready[at.slot], at.parity);\n", "")],
    "slots filled before they are free": [("        barrier_wait(shared.empty[at.slot], at.parity ^ 1);\n", "")],
    "a ring that does not go round": [("      if (j == wrap) right.at -= Config::TENSOR_BYTES;\n", "")],
    "sums of the bias gradient not waited for": [
        ("      sums.flush();\n      named_barrier(CONSUMERS, THREADS);\n", "      sums.flush();\n")
    ],
    "sums of the bias gradient left in registers": [("      sums.flush();\n      named", "      named")],
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_broken_kernel_is_caught(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Strip(columns=14, block_columns=15, slots=4, warps=8)
    monkeypatch.setattr(hopper_ring_backward, "choose_strip", lambda problem, needs_rpb_grad, device: strip)
    break_kernel("src/hopper_ring_backward.cuh", MUTATIONS[mistake], tmp_path, monkeypatch)
    for seed in range(6):
        with use_runtime("cpu", EmulatorRuntime(seed, multiprocessors=2)):
            try:
                assert_gradients(make_call(make_problem((14, 14), (7, 7), batch=4)))
            except (EmulationError, AssertionError):
                return
    pytest.fail(f"nobody noticed: {mistake}")
