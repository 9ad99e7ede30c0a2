"""The hopper_strip backward kernel's source, run on the CPU, against the reference in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import test_strip_backward
import torch
from emulator import EmulationError, EmulatorRuntime, guarded
from test_hopper_mutations import break_kernel
from test_strip_backward import assert_gradients, make_call

from kernels.cuda import fused, hopper_strip_backward, runtime
from kernels.cuda.hopper_strip_backward import Cut
from kernels.cuda.runtime import use_runtime
from kernels.problem import Axis, Problem


@pytest.fixture(autouse=True)
def _this_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_strip_backward, "strip_backward", hopper_strip_backward)


def make_problem(space: tuple[int, int], window: tuple[int, int], **more: Any) -> Problem:
    """With the wide heads and without the bias that the family is for."""
    return test_strip_backward.make_problem(space, window, **({"head_dim": 64, "rpb_dtype": None} | more))


@pytest.mark.parametrize(
    ("space", "window"),
    [
        ((14, 14), (7, 7)),  # lifted tiles of keys; pairs of columns of clamped windows
        ((28, 28), (7, 7)),  # two strips
        ((8, 46), (7, 7)),  # strips of different widths, a lone row of tiles
        ((11, 12), (5, 5)),
        ((9, 10), (3, 3)),
        ((12, 14), (7, 3)),
    ],
)
def test_borders_and_windows(emulator: EmulatorRuntime, space: tuple[int, int], window: tuple[int, int]) -> None:
    assert_gradients(make_call(make_problem(space, window, batch=4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_packed_qkv_and_lse(emulator: EmulatorRuntime, dtype: torch.dtype) -> None:
    problem = make_problem((12, 14), (7, 7), dtype=dtype, batch=2, heads=2)
    assert_gradients(make_call(problem, packed=True, with_grad_lse=True))


def test_any_strides_of_grad_output(emulator: EmulatorRuntime) -> None:
    call = make_call(make_problem((12, 10), (5, 3), heads=2, batch=2))
    transposed = guarded(call.grad_output.transpose(0, 3).contiguous()).transpose(0, 3)
    assert not transposed.is_contiguous()
    assert_gradients(dataclasses.replace(call, grad_output=transposed))


@pytest.mark.parametrize("cut", [Cut(3, 3), Cut(5, 3)])
def test_walks(emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, cut: Cut) -> None:
    """Several to a block, of strips of different widths, down rings that go round."""
    monkeypatch.setattr(hopper_strip_backward, "choose_cut", lambda problem, device: cut)
    assert_gradients(make_call(make_problem((14, 24 if cut.strips < 4 else 38), (7, 7), batch=5, heads=2)))


def test_same_bits_twice(emulator: EmulatorRuntime) -> None:
    call = make_call(make_problem((14, 14), (7, 7), batch=6))
    first, second = call.run(), call.run()
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_lengths_that_tiles_cover() -> None:
    for window in (3, 5, 7):
        for length in range(8, 80):
            axis = Axis(length, window)
            uncovered = length % 8 in {3: (), 5: (1,), 7: (1, 2)}[window]
            assert (hopper_strip_backward.lift_of(axis) is None) == uncovered, length
            # Twelve columns: two keys are seen from all of them.
            assert hopper_strip_backward.covers_columns(axis) == (length % 2 == 0 and (length, window) != (12, 7)), (
                length
            )


@pytest.mark.parametrize("length", [8, 14, 28, 56, 200])
def test_row_blocks_fit(length: int) -> None:
    device = runtime.DeviceProperties((9, 0), 132, 227 << 10)
    for window in (3, 5, 7):
        problem = make_problem((length, length), (window, window), batch=64)
        cut = hopper_strip_backward.choose_cut(problem, device)
        assert cut is not None
        assert hopper_strip_backward.plan(problem, cut, device).shared_bytes <= device.shared_memory


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": torch.float32}, "float16"),
        ({"axes": (Axis(24, 7), Axis(24, 9))}, "window"),
        ({"axes": (Axis(24, 6), Axis(24, 7))}, "window"),
        ({"axes": (Axis(24, 7, causal=True), Axis(24, 7))}, "causal"),
        ({"axes": (Axis(24, 7, stride=2), Axis(24, 7))}, "stride"),
        ({"axes": (Axis(24, 7, dilation=2), Axis(24, 7))}, "dilation"),
        ({"axes": (Axis(24, 7),)}, "rank 1"),
        ({"axes": (Axis(25, 7), Axis(24, 7))}, "cover"),
        ({"axes": (Axis(24, 7), Axis(25, 7))}, "cover"),
        ({"axes": (Axis(7, 7), Axis(24, 7))}, "cover"),
        ({"axes": (Axis(24, 7), Axis(12, 7))}, "cover"),
        ({"head_dim": 128, "value_dim": 128}, "head_dim"),
        ({"heads": 4, "key_heads": 2}, "key head"),
        ({"additional": 3}, "additional"),
        ({"scale": 0.0}, "scale"),
        ({"batch": 1}, "strips"),
    ],
)
def test_refusals_say_why(emulator: EmulatorRuntime, change: dict[str, object], word: str) -> None:
    accepted = make_problem((24, 24), (7, 7), batch=4)
    assert hopper_strip_backward.why_not(accepted) is None
    assert fused.backward_families(accepted, True)[0] is hopper_strip_backward
    reason = hopper_strip_backward.why_not(dataclasses.replace(accepted, **change))
    assert reason is not None
    assert word in reason


def test_what_another_family_does_faster_is_left_to_it(emulator: EmulatorRuntime) -> None:
    for head_dim, rpb_dtype, is_faster in (
        (32, torch.float32, False),
        (32, None, False),
        (64, torch.float32, False),
        (64, None, True),
    ):
        problem = make_problem((24, 24), (7, 7), head_dim=head_dim, rpb_dtype=rpb_dtype, batch=4)
        reason = hopper_strip_backward.why_not(problem)
        assert (reason is None) == is_faster
        assert reason is None or "faster" in reason


def test_other_devices_are_refused() -> None:
    with use_runtime("cpu", EmulatorRuntime(capability=(10, 0))):
        reason = hopper_strip_backward.why_not(make_problem((24, 24), (7, 7), batch=4))
    assert reason is not None
    assert "9.0" in reason


def test_gradients_that_tensor_copies_cannot_read_are_refused() -> None:
    call = make_call(make_problem((8, 8), (3, 3)))
    crooked = torch.empty(call.grad_output.numel() + 1, dtype=torch.bfloat16)[1:].view(call.grad_output.shape)
    assert hopper_strip_backward.why_not_gradient(call.operands, call.grad_output) is None
    reason = hopper_strip_backward.why_not_gradient(call.operands, crooked)
    assert reason is not None
    assert "aligned" in reason


WORK = "        work(walk, step, slots);\n"
GIVE_BACK = "        release(shared.empty[slots[0]]);\n"
WEIGHED = "          weigh(warp, scores, b, rows);\n"
MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "row blocks not waited for": [
        ("    barrier_wait(shared.full[at.slot], at.parity);\n", ""),
        ("      barrier_sleep(shared.full[at.slot], at.parity);\n", ""),
    ],
    "statistics not waited for": [("    barrier_wait(shared.ready[at.slot], at.parity);\n", "")],
    "slots filled before they are free": [("        barrier_sleep(shared.empty[at.slot], at.parity ^ 1);\n", "")],
    "too few bytes expected": [("(full, Config::SLOT_BYTES)", "(full, Config::SLOT_BYTES - 16)")],
    "output not waited for": [("      barrier_sleep(shared.output_full, parity);\n", "")],
    "output overwritten while it is read": [("      named_barrier(MEASURED, MEASURERS);\n", "")],
    "slopes read while they are computed": [(WEIGHED + "          wgmma_wait<0>();\n", WEIGHED)],
    "row blocks given back while they are multiplied": [(WORK + GIVE_BACK, GIVE_BACK + WORK)],
    "no fence before a product": [
        ("    wgmma_fence();\n    multiply_transposed(scores", "    multiply_transposed(scores")
    ],
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_broken_kernel_is_caught(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel("src/hopper_strip_backward.cuh", MUTATIONS[mistake], tmp_path, monkeypatch)
    for seed in range(6):
        with use_runtime("cpu", EmulatorRuntime(seed, multiprocessors=2)):
            try:
                assert_gradients(make_call(make_problem((14, 14), (7, 7), batch=6)))
            except (EmulationError, AssertionError):
                return
    pytest.fail(f"nobody noticed: {mistake}")
