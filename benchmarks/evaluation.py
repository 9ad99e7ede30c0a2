"""The whole evaluation as a list of steps, the most wanted first: what `scripts/benchmark.py` goes through.

Every step appends to its own file of results and skips what the file holds, so that any number of short calls add up to
the whole. A call's time is shared out by the steps' weights first; what is left then goes to the unfinished ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import models, sweep
from benchmarks.cases import adapt, suite
from benchmarks.methods import default_methods

GOALS = ("nat_tiny", "dinat_tiny", "swin_tiny_patch4_window7_224")


@dataclass(frozen=True)
class Step:
    """One part of the evaluation; `run(deadline)` begins nothing after `deadline` and says whether it is complete."""

    title: str
    weight: float
    run: Callable[[float], bool]


def plan(device: torch.device, folder: Path, quick: bool) -> list[Step]:
    """The steps for `device`, writing to `folder`; `quick` for a selection of each suite."""
    return _on_gpu(device, folder, quick) if device.type == "cuda" else _on_cpu(device, folder)


def _kernels(
    names: Sequence[str], directions: Sequence[str], weight: float, device: torch.device, folder: Path,
    methods: Sequence[str] = (), quick: bool = True, batch: int | None = None, dtypes: Sequence[str] = (),
) -> list[Step]:  # fmt: skip
    def step(name: str) -> Step:
        cases = adapt(suite(name, quick), batch, dtypes)

        def run(deadline: float) -> bool:
            chosen = methods or default_methods(device)
            path = folder / f"kernels-{name}.jsonl"
            sweep.run(name, cases, chosen, device, directions, path, 0.05, deadline)
            return not sweep.pending(cases, chosen, directions, path)

        return Step(f"{name}, {' and '.join(directions)}", weight / len(names), run)

    return [step(name) for name in names]


def _models(title: str, weight: float, settings: Sequence[models.Setting], device: torch.device, folder: Path) -> Step:
    path = folder / "models.jsonl"

    def run(deadline: float) -> bool:
        models.run(settings, device, path, 1.0, deadline)
        return not models.pending(settings, path)

    return Step(f"models, {title}", weight, run)


def _on_gpu(device: torch.device, folder: Path, quick: bool) -> list[Step]:
    paper, where = (*models.PAPER, *models.CONTEXT), (device, folder)
    without_flex = ("fused", "gemm", "naive", "dense", "natten")  # FlexAttention compiles for seconds, every problem
    goals = [
        *models.settings(GOALS, ["inference", "training"], ["fused"], compile=True),
        *models.settings(GOALS, ["inference", "training"], ["fused", "naive"]),
        *models.settings(GOALS, ["inference", "training"], ["fused"], cuda_graph=True, compile=True),
    ]
    # As CUDA graphs, so that the table is of the GPU alone: in eager mode a slow host decides.
    graphed = (paper, ["inference", "training"], ["fused", "naive", "gemm"])
    table = models.settings(*graphed, cuda_graph=True)
    others = models.settings(*graphed, cuda_graph=True, precision="float16")
    single = models.settings(*graphed, cuda_graph=True, precision="float32")
    return [
        *_kernels(["nat"], ["forward", "backward"], 2, *where, without_flex, quick=False),
        _models("goals", 4, goals, *where),
        *_kernels(["experiment-2"], ["forward", "backward"], 1, *where, without_flex, quick),
        *_kernels(["paper-1d", "paper-3d"], ["forward", "both"], 2, *where, without_flex, quick),
        *_kernels(["workloads"], ["forward"], 2, *where, ("fused", "flex", "dense", "natten"), quick=False),
        _models("the paper's table, bfloat16", 2, table, *where),
        _models("the paper's table, float32", 1, single, *where),
        _models("the paper's table, float16", 1, others, *where),
        *_kernels(["floors"], ["forward", "backward"], 1, *where, without_flex, quick=False),
        *_kernels(["experiment-1", "experiment-3", "paper-2d"], ["forward", "both"], 1, *where, without_flex, quick),
        *_kernels(["ablation-window"], ["forward"], 1, *where, quick=quick),
    ]


def _on_cpu(device: torch.device, folder: Path) -> list[Step]:
    where, single = (device, folder), ["float32"]
    names = ("nat_mini", "nat_tiny", "dinat_tiny", *models.CONTEXT)
    table = models.settings(names, ["inference", "training"], ["native", "tiled"], batch=4, precision="float32")
    return [
        *_kernels(["nat", "experiment-1", "experiment-3"], ["forward", "both"], 3, *where, batch=1, dtypes=single),
        *_kernels(["experiment-2"], ["forward"], 1, *where, batch=1, dtypes=["float32", "bfloat16"]),
        *_kernels(["ablation-window", "workloads"], ["forward"], 2, *where, batch=1, dtypes=single),
        _models("a few, float32", 2, table, *where),
    ]


def run(steps: Sequence[Step], seconds: float, console: Console) -> list[Step]:
    """Goes through `steps` for about so many `seconds`, and returns those that are not finished."""
    end = time.monotonic() + seconds
    unfinished = list(steps)
    for shared in (True, False):
        weight = sum(step.weight for step in unfinished)
        for step in list(unfinished):
            now = time.monotonic()
            if now >= end:
                return unfinished
            deadline = now + (end - now) * step.weight / weight if shared else end
            weight -= step.weight
            console.print(f"[bold]{step.title}[/] (for {deadline - now:.0f} s, {end - now:.0f} s left in all)")
            if step.run(deadline):
                unfinished.remove(step)
    return unfinished
