"""Hopper kernels broken on purpose: what the checks of test_hopper.py say where a wait, fence or barrier is missing."""

from __future__ import annotations

from pathlib import Path

import emulator as emulation
import pytest
import torch
from emulator import EmulationError, EmulatorRuntime
from test_flash import make_problem
from test_hopper import (
    SKIPPING,
    _any_window,  # noqa: F401  (a fixture that applies here too)
    check_backward,
    check_forward,
    check_scores_far_below_zero,
    use_tiles,
)
from test_hopper_strip import assert_forward, check_large_scores
from test_mutations import source_of
from test_strip_forward import make_operands
from test_strip_forward import make_problem as make_strip_problem

from kernels.cuda import hopper_backward, hopper_joint
from kernels.cuda.hopper_tiles import Tiles
from kernels.cuda.runtime import use_runtime
from kernels.problem import Axis

KEY_WAIT = "      barrier_wait(shared.key_full[stage(step)], parity(step));\n      Products"
VALUE_WAIT = "      barrier_wait(shared.value_full[stage(step)], parity(step));\n      Products"
LAST_WAIT = "        wgmma_wait<0>();\n        release(shared.value_empty[stage(last)]);\n        rescale"
MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "turns only for boxes that are needed": [
        ("        begin_turn();\n        end_turn();\n        // The", "        // The")
    ],
    "one arrival for a whole warpgroup": [
        ("if (lane == 0) barrier_arrive", "if (thread == 0) barrier_arrive"),
        ("barrier_init(shared.key_empty[s], 4 * ", "barrier_init(shared.key_empty[s], "),
        ("barrier_init(shared.value_empty[s], 4 * ", "barrier_init(shared.value_empty[s], "),
    ],
    "keys not waited for": [(KEY_WAIT, "      Products")],
    "values not waited for": [(VALUE_WAIT, "      Products")],
    "keys overwritten while they are multiplied": [
        ("      wgmma_wait<0>();\n      release(shared.key_empty", "      release(shared.key_empty")
    ],
    "scores read while they are computed": [("        wgmma_wait<1>();\n", "")],
    "output scaled while it is summed up": [(LAST_WAIT, LAST_WAIT[LAST_WAIT.index("\n") + 1 :])],
    "too few bytes expected": [("key_full[s], Tiles::BOX_BYTES);", "key_full[s], Tiles::BOX_BYTES - 16);")],
    "no fence before a product": [
        ("    wgmma_fence();\n    FASTNA_UNROLL\n    for (int k = 0; k < D", "    for (int k = 0; k < D")
    ],
    "values one row too far apart": [("columns + k * 16 * ROW, N * ROW)", "columns + k * 16 * ROW, N * ROW + ROW)")],
}


GRADIENT_MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "boxes released before their gradients are summed up": [
        ("        wgmma_wait<QUEUED>();\n        release_added(last);", "        release_added(last);")
    ],
    "slopes read while they are computed": [
        ("        wgmma_wait<0>();\n        differentiate();\n        last", "        differentiate();\n        last")
    ],
    "scores of the box before": [("wgmma_wait<FIRST + SECOND + QUEUED>();", "")],
    "statistics not waited for": [("if constexpr (KEYS && !QUEUED) barrier_wait", "if constexpr (false) barrier_wait")],
    "bytes of the statistics forgotten": [("Tiles::BOX_BYTES + (KEYS ? N * sizeof(float4) : 0)", "Tiles::BOX_BYTES")],
    "keys gathered from the first head only": [
        ("const int shared_heads;", "static constexpr int shared_heads = 1;"),
        (", shared_heads(KEYS ? args_.geometry.heads / args_.geometry.key_heads : 1)", ""),
    ],
    "the first additional keys in every box of them": [("first_additional(step), 0, 0,", "0, 0, 0,")],
    "weights of no additional key": [("i % 2 < left ?", "i % 2 < N ?")],
    "gradients stored before all warps are done": [
        ("    named_barrier(1 + w, 128);\n    for (int i = thread", "    for (int i = thread")
    ],
}


RELEASE = "        wgmma_wait<1>();\n        release(shared.query_empty[s]);\n        release(shared.grad_empty[s]);\n"
JOINT_MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "slopes not shown to the matrix units": [
        (
            "+ quad * 4) = packed_slopes[i];\n      }\n      fence_async_reads();",
            "+ quad * 4) = packed_slopes[i];\n      }",
        )
    ],
    "sums not shown to the copy engine": [("      fence_async_reads();\n      sync_warp();\n", "      sync_warp();\n")],
    "slopes multiplied before all are there": [
        ("      named_barrier(ALL_CONSUMERS, GROUPS * 128);\n      wgmma_fence", "      wgmma_fence")
    ],
    "one buffer for the slopes": [
        ("u8* to = shared.slopes[step & 1][w]", "u8* to = shared.slopes[0][w]"),
        ("shared_address(shared.slopes[step & 1][v])", "shared_address(shared.slopes[0][v])"),
    ],
    "sums overwritten while they are added": [("      barrier_wait(shared.sums_empty, (walk.step & 1) ^ 1);\n", "")],
    "sums given back before they are read": [("        wait_reductions_read();\n", "")],
    "sums read while they are computed": [
        (
            "        wgmma_wait<0>();\n        leave_sums(walk, grad_query);\n      } else",
            "        leave_sums(walk, grad_query);\n      } else",
        )
    ],
    "boxes released before their gradients are summed up": [
        (RELEASE, ""),
        ("        Products::add(grad_value", f"{RELEASE}        Products::add(grad_value"),
    ],
    "keys overwritten while others multiply them": [
        ("    // Nobody multiplies with these keys any more.\n    named_barrier(ALL_CONSUMERS, GROUPS * 128);\n", "")
    ],
    "bias not waited for": [
        (
            "GROUPS * 128);\n      named_barrier(ALL_CONSUMERS, GROUPS * 128);\n    } else {\n",
            "GROUPS * 128);\n    } else {\n",
        )
    ],
    "rows that are no key not hidden": [("      sight.all[a] = {0, 0};\n", "")],
}


STRIP_MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "row blocks not waited for": [
        ("          barrier_wait(shared.full[at.slot], at.parity);\n        }", "        }"),
    ],
    "queries not waited for": [("        barrier_wait(shared.query_full[query_at.slot], query_at.parity);\n", "")],
    "row blocks overwritten while the next step needs them": [
        ("release(shared.empty[above.slot]);", "release(shared.empty[at.slot]);"),
        (
            "      }\n      release(shared.empty[at.slot]);",
            "      }\n      release(shared.empty[at.slot == 0 ? STAGES - 1 : at.slot - 1]);",
        ),
    ],
    "the last row block never released": [("      }\n      release(shared.empty[at.slot]);", "      }")],
    "bias not waited for": [("    named_barrier(ALL_CONSUMERS, WARPS * WARP);\n", "")],
    "weights beyond what their type holds": [("if (raised || all_in_warp(", "if (true || all_in_warp(")],
    "sums not brought to the raised top": [("          sum[i] *= rescale;\n", "")],
    "the second column's window where the first one's is": [("const bool same = ", "const bool same = true || ")],
    "windows not clamped": [("minimum(maximum(position - WINDOW / 2, 0), length - WINDOW)", "position - WINDOW / 2")],
}


def break_kernel(header: str, edits: list[tuple[str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = (
        "fastna/hopper_tiles.cuh",
        "fastna/hopper_additional.cuh",
        "fastna/hopper_products.cuh",
        "fastna/hopper_strip.cuh",
        "fastna/hopper_ring_backward.cuh",
    )
    texts = {name: source_of(name) for name in (header, *shared)}
    for old, new in edits:
        found = [name for name, text in texts.items() if old in text]
        assert [texts[name].count(old) for name in found] == [1], f"{header} changed: say anew how to break it"
        texts[found[0]] = texts[found[0]].replace(old, new)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(emulation, "ROOTS", (folder, *emulation.ROOTS))


@pytest.mark.parametrize("mistake", GRADIENT_MUTATIONS)
def test_a_broken_gradient_is_caught(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel("src/hopper_gradient.cuh", GRADIENT_MUTATIONS[mistake], tmp_path, monkeypatch)
    use_tiles(monkeypatch, Tiles((1, 1, 64), (1, 1, 2), (1, 1, 16), 2))
    for seed in range(8):
        with use_runtime("cpu", EmulatorRuntime(seed)):
            try:
                check_backward(make_problem(Axis(300, 70), heads=2, key_heads=1, head_dim=64, additional=20))
                check_scores_far_below_zero(hopper_backward, additional=20)
            except (EmulationError, AssertionError):
                return
    pytest.fail(f"nobody noticed: {mistake}")


@pytest.mark.parametrize("mistake", JOINT_MUTATIONS)
def test_broken_joint_gradients_are_caught(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel("src/hopper_joint.cuh", JOINT_MUTATIONS[mistake], tmp_path, monkeypatch)
    for seed in range(8):
        with use_runtime("cpu", EmulatorRuntime(seed)):
            try:
                problem = make_problem(Axis(300, 140), heads=2, head_dim=64, rpb_dtype=torch.float32)
                check_backward(problem, family=hopper_joint)
                check_scores_far_below_zero(hopper_joint)
            except (EmulationError, AssertionError):
                return
    pytest.fail(f"nobody noticed: {mistake}")


@pytest.mark.parametrize("mistake", STRIP_MUTATIONS)
def test_a_broken_strip_is_caught(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel("src/hopper_strip_forward.cuh", STRIP_MUTATIONS[mistake], tmp_path, monkeypatch)
    problem = make_strip_problem((20, 14), (7, 7), batch=8, dtype=torch.float16)
    for seed in range(8):
        with use_runtime("cpu", EmulatorRuntime(seed, multiprocessors=2)):
            try:
                assert_forward(problem, make_operands(problem))
                check_large_scores(torch.float16)
            except (EmulationError, AssertionError):
                return
    pytest.fail(f"nobody noticed: {mistake}")


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_broken_kernel_is_caught(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel("src/hopper_forward.cuh", MUTATIONS[mistake], tmp_path, monkeypatch)
    noticed = 0
    for warpgroups in (2, 3):
        use_tiles(monkeypatch, Tiles((1, 1, 64), (1, 1, warpgroups), (1, 1, 16), 2))
        for seed in range(3):
            with use_runtime("cpu", EmulatorRuntime(seed)):
                try:
                    check_forward(make_problem(*SKIPPING, head_dim=128))
                except (EmulationError, AssertionError):
                    noticed += 1
    assert noticed, f"nobody noticed: {mistake}"
