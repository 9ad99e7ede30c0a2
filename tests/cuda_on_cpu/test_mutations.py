"""Kernels broken on purpose are caught: what the other tests here would say of such a mistake.

Each mutation replaces one piece of a kernel's text; the call beside it passes on the true text and must fail on the
broken one, by an error of the emulator or by a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import emulator
import pytest
import torch
from emulator import EmulationError, EmulatorRuntime, guarded

from kernels import neighborhood_attention
from kernels.cuda.jit import KERNELS
from kernels.cuda.runtime import use_runtime

SEEDS = (1, 2, 3)


def attends_as_reference(
    backend: str,
    kernel: str,
    space: tuple[int, ...],
    window: int,
    seed: int,
    dilation: int = 1,
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
) -> bool:
    """Whether the backend's forward pass gives the reference's output on the emulator, through the kernel named."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *space, 2, 32)
    operands = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    rpb = torch.randn(2, *(2 * window - 1 for _ in space), generator=generator)
    exact = [t.double() for t in operands]
    expected = neighborhood_attention(*exact, window, dilation=dilation, rpb=rpb.double(), backend="reference")
    runtime = EmulatorRuntime(seed)
    with use_runtime("cpu", runtime):
        at_end = [guarded(t) for t in operands]
        try:
            output = neighborhood_attention(*at_end, window, dilation=dilation, rpb=rpb, backend=backend)
        except EmulationError:
            return False
    assert any(source.header == kernel for source in runtime.kernels), f"the call does not reach {kernel}"
    error = (output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return bool((error <= (1e-2 if dtype != torch.float32 else 1e-5)).all())  # NaN is not


STRIP = partial(attends_as_reference, "fused", "src/strip_forward.cuh", (15, 30), 7)
BLOCK = partial(attends_as_reference, "fused", "src/block_forward.cuh", (14, 14), 7, dilation=2, batch=7)
FLASH = partial(attends_as_reference, "fused", "src/flash_forward.cuh", (150,), 33)
NAIVE = partial(attends_as_reference, "naive", "src/naive_scores.cuh", (20,), 5, dtype=torch.float32)
GEMM = partial(attends_as_reference, "gemm", "src/gemm_scores.cuh", (12, 13), 5)


@dataclass(frozen=True)
class Mutation:
    mistake: str
    header: str  # as kernels include it
    old: str
    new: str
    call: Callable[..., bool]


MUTATIONS = [
    Mutation(
        "window one too far at the end of an axis",
        "fastna/window.cuh",
        "length - axis.window);",
        "length - axis.window + 1);",
        NAIVE,
    ),
    Mutation(
        "window one short of the end of an axis",
        "fastna/strip_layout.cuh",
        "maximum(position - WINDOW / 2, 0), length - WINDOW)",
        "maximum(position - WINDOW / 2, 0), length - WINDOW - 1)",
        STRIP,
    ),
    Mutation(
        "keys read without their swizzle",
        "src/strip_forward.cuh",
        "key_tile + Layout::offset(column + lane % 8, 4 * i + lane / 8)",
        "key_tile + (column + lane % 8) * Layout::BYTES + (4 * i + lane / 8) * 16",
        STRIP,
    ),
    Mutation(
        "no wait for the keys and values",
        "src/strip_forward.cuh",
        "  wait_copies<0>();\n  sync_threads();\n",
        "  sync_threads();\n",
        STRIP,
    ),
    Mutation(
        "no barrier between copies and products",
        "src/strip_forward.cuh",
        "  wait_copies<0>();\n  sync_threads();\n",
        "  wait_copies<0>();\n",
        STRIP,
    ),
    Mutation(
        "waiting for one group too few",
        "src/block_forward.cuh",
        "wait_copies<STAGES - 2>();",
        "wait_copies<STAGES - 1>();",
        BLOCK,
    ),
    Mutation(
        "the last key of a window masked",
        "fastna/flash_scores.cuh",
        "width[i] = static_cast<u32>(seen.size());",
        "width[i] = static_cast<u32>(seen.size() - 1);",
        FLASH,
    ),
    Mutation(
        "no barrier before a tile is used",
        "src/flash_forward.cuh",
        "      wait_copies<0>();\n      sync_threads();\n      if (index + 1",
        "      wait_copies<0>();\n      if (index + 1",
        FLASH,
    ),
    Mutation(
        "no wait for the operands",
        "src/gemm_scores.cuh",
        "wait_copies<0>();",
        "",
        GEMM,
    ),
]


def source_of(header: str) -> str:
    path = next(root / header for root in (KERNELS, KERNELS / "include") if (root / header).is_file())
    return path.read_text()


@pytest.mark.parametrize("call", [STRIP, BLOCK, FLASH, NAIVE, GEMM], ids=lambda call: Path(call.args[1]).stem)
def test_the_true_kernel_passes(call):
    assert all(call(seed=seed) for seed in SEEDS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.mistake.replace(" ", "-"))
def test_a_broken_kernel_is_caught(mutation, tmp_path, monkeypatch):
    text = source_of(mutation.header)
    assert text.count(mutation.old) == 1, f"{mutation.header} changed: say anew how to break it"
    broken = tmp_path / mutation.header
    broken.parent.mkdir(parents=True)
    broken.write_text(text.replace(mutation.old, mutation.new))
    monkeypatch.setattr(emulator, "ROOTS", (tmp_path, *emulator.ROOTS))
    assert not all(mutation.call(seed=seed) for seed in SEEDS), f"nobody noticed: {mutation.mistake}"
