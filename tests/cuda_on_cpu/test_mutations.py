"""Kernels broken on purpose are caught: what the other tests here would say of such a mistake.

Each mutation replaces one piece of a kernel's text; the call beside it passes on the true text and must fail on the
broken one, by an error of the emulator or by a wrong result. Races are watched for, so one order of events is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import emulator
import pytest
import torch
from emulator import EmulationError, EmulatorRuntime, guarded

from kernels import neighborhood_attention
from kernels.cuda.jit import KERNELS
from kernels.cuda.runtime import use_runtime


def attends_as_reference(
    backend: str,
    kernels: tuple[str, ...],
    space: tuple[int, ...],
    window: int,
    dilation: int = 1,
    batch: int = 1,
    additional: int = 0,
    dtype: torch.dtype = torch.float16,
    backward: bool = False,
) -> bool:
    """Whether the backend gives the reference's results on the emulator, through all the kernels named."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    names = ["query", "key", "value", "rpb"]
    tensors = [normal(batch, *space, 2, 32) for _ in range(3)]
    tensors.append(normal(2, *(2 * window - 1 for _ in space), dtype=torch.float32))
    if additional:
        names += ["additional_keys", "additional_values"]
        tensors += [normal(batch, additional, 2, 32) for _ in range(2)]
    grad_output = normal(batch, *space, 2, 32)

    def run(tensors: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        leaves = [tensor.requires_grad_(backward) for tensor in tensors]
        operands = dict(zip(names, leaves, strict=True))
        output = neighborhood_attention(**operands, kernel_size=window, dilation=dilation, backend=backend)
        if not backward:
            return [output]
        return [output, *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]

    expected = run([tensor.double() for tensor in tensors], "reference")
    runtime = EmulatorRuntime(seed=1, watches_races=True)
    with use_runtime("cpu", runtime):
        try:
            actual = run([guarded(tensor) for tensor in tensors], backend)
        except EmulationError:
            return False
    assert {source.header for source in runtime.kernels} >= set(kernels), f"the call does not reach {kernels}"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return all(
        bool(((a.double() - e).norm(dim=-1) <= tolerance * e.norm(dim=-1).clamp_min(e.norm() / e.numel())).all())
        if index == 0  # of every token; NaN is not
        else bool((a.double() - e).norm() <= tolerance * e.norm())
        for index, (a, e) in enumerate(zip(actual, expected, strict=True))
    )


STRIP = partial(attends_as_reference, "fused", ("src/strip_forward.cuh",), (15, 30), 7)
STRIP_BACKWARD = partial(attends_as_reference, "fused", ("src/strip_backward.cuh",), (18, 13), 5, backward=True)
BLOCK = partial(attends_as_reference, "fused", ("src/block_forward.cuh",), (14, 14), 7, dilation=2, batch=7)
BLOCK_BACKWARD = partial(
    attends_as_reference, "fused", ("src/block_backward.cuh",), (10, 10), 5, dilation=2, backward=True
)
FLASH = partial(attends_as_reference, "fused", ("src/flash_forward.cuh",), (150,), 33)
FLASH_BACKWARD = partial(
    attends_as_reference,
    "fused",
    ("src/flash_query_gradient.cuh", "src/flash_key_gradient.cuh"),
    (150,),
    33,
    additional=3,
    backward=True,
)
NAIVE = partial(
    attends_as_reference,
    "naive",
    ("src/naive_scores.cuh", "src/naive_output.cuh", "src/naive_inverse.cuh", "src/naive_additional.cuh"),
    (20,),
    5,
    additional=3,
    dtype=torch.float32,
    backward=True,
)
GEMM = partial(
    attends_as_reference,
    "gemm",
    ("src/gemm_scores.cuh", "src/gemm_output.cuh", "src/gemm_inverse.cuh", "src/weights_bias_gradient.cuh"),
    (12, 13),
    5,
    additional=3,
    backward=True,
)


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
        "from.key_tile + Layout::offset(from.column + lane % 8, 4 * i + lane / 8)",
        "from.key_tile + (from.column + lane % 8) * Layout::BYTES + (4 * i + lane / 8) * 16",
        STRIP,
    ),
    Mutation(
        "too few key rows near a border",
        "src/strip_forward.cuh",
        "round_up(reach, 2), KEY_ROWS - 4)",
        "round_up(reach, 2) - 2, KEY_ROWS - 4)",
        STRIP,
    ),
    Mutation(
        "copies of the wrong rows",
        "fastna/strip_layout.cuh",
        "sources[k] += static_cast<i64>(THREADS / WARP) * views[k].row;",
        "sources[k] += static_cast<i64>(THREADS / WARP - 1) * views[k].row;",
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
    Mutation("no wait for the operands", "src/gemm_scores.cuh", "wait_copies<0>();", "", GEMM),
    Mutation(
        "weights used before the other warps have gathered theirs",
        "src/gemm_inverse.cuh",
        "    wait_copies<0>();\n    sync_threads();\n",
        "    wait_copies<0>();\n",
        GEMM,
    ),
    Mutation(
        "values used before they have come",
        "src/gemm_output.cuh",
        "    wait_copies<0>();\n    sync_threads();\n",
        "    sync_threads();\n",
        GEMM,
    ),
    Mutation(
        "the bias gradient's queries read before they are described",
        "src/weights_bias_gradient.cuh",
        "    sync_threads();\n    if (entry < offsets) {",
        "    if (entry < offsets) {",
        GEMM,
    ),
    Mutation(
        "the last key seen by too few queries",
        "fastna/window.cuh",
        "everyone = position >= length - axis.window;",
        "everyone = position > length - axis.window;",
        NAIVE,
    ),
    Mutation(
        "the last additional key forgotten",
        "src/naive_output.cuh",
        "i < geometry.additional",
        "i < geometry.additional - 1",
        NAIVE,
    ),
    Mutation(
        "keys' gradients before all weights are there",
        "src/block_backward.cuh",
        "    sync_threads();  // all weights are there, and keys and values are no longer read\n",
        "",
        BLOCK_BACKWARD,
    ),
    Mutation(
        "weights read without their swizzle",
        "src/block_backward.cuh",
        "const u32 at = Weights::offset(row + lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);",
        "const u32 at = (row + lane % 8 + lane / 16 * 8) * Weights::BYTES + (2 * warp + lane / 8 % 2) * 16;",
        BLOCK_BACKWARD,
    ),
    Mutation(
        "the bias gradient one pair short at a border",
        "src/block_backward.cuh",
        "k < minimum(windows[2], windows[2] - offset[2])",
        "k < minimum(windows[2], windows[2] - offset[2]) - 1",
        BLOCK_BACKWARD,
    ),
    Mutation(
        "no barrier before a tile of keys is used",
        "src/flash_query_gradient.cuh",
        "        wait_copies<0>();\n        sync_threads();\n        if (index + 1",
        "        wait_copies<0>();\n        if (index + 1",
        FLASH_BACKWARD,
    ),
    Mutation(
        "no wait for a tile of queries",
        "src/flash_key_gradient.cuh",
        "      wait_copies<0>();\n      sync_threads();\n      if (index + 1",
        "      sync_threads();\n      if (index + 1",
        FLASH_BACKWARD,
    ),
    Mutation(
        "the bias gradient one query short",
        "fastna/flash_bias_gradient.cuh",
        "end[i] = minimum(Queries::extent(i), Keys::extent(i) - shift[i]);",
        "end[i] = minimum(Queries::extent(i), Keys::extent(i) - shift[i] - 1);",
        FLASH_BACKWARD,
    ),
    Mutation(
        "rows replaced while they are used",
        "src/strip_backward.cuh",
        "      sync_threads();  // the rows that these replace have been used\n",
        "",
        STRIP_BACKWARD,
    ),
    Mutation(
        "no barrier between a step's rows and their use",
        "src/strip_backward.cuh",
        "    loader.finish(fresh);\n    sync_threads();\n",
        "    loader.finish(fresh);\n",
        STRIP_BACKWARD,
    ),
]


def source_of(header: str) -> str:
    path = next(root / header for root in (KERNELS, KERNELS / "include") if (root / header).is_file())
    return path.read_text()


CALLS = {
    "strip": STRIP,
    "strip_backward": STRIP_BACKWARD,
    "block": BLOCK,
    "block_backward": BLOCK_BACKWARD,
    "flash": FLASH,
    "flash_backward": FLASH_BACKWARD,
    "naive": NAIVE,
    "gemm": GEMM,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_true_kernel_passes(name):
    assert CALLS[name]()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.mistake.replace(" ", "-"))
def test_a_broken_kernel_is_caught(mutation, tmp_path, monkeypatch):
    text = source_of(mutation.header)
    assert text.count(mutation.old) == 1, f"{mutation.header} changed: say anew how to break it"
    broken = tmp_path / mutation.header
    broken.parent.mkdir(parents=True)
    broken.write_text(text.replace(mutation.old, mutation.new))
    monkeypatch.setattr(emulator, "ROOTS", (tmp_path, *emulator.ROOTS))
    assert not mutation.call(), f"nobody noticed: {mutation.mistake}"
