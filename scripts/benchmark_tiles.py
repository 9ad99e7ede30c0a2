#!/usr/bin/env python3
"""Times every candidate tile of the small-window kernels on the layers of NAT: which cut of a map is the fastest.

    python scripts/benchmark_tiles.py                       forward and backward, four layers: a few minutes
    python scripts/benchmark_tiles.py --direction backward --case "14^2 h8"

The candidates are those of kernels/cuda/strip.py and strip_backward.py, the default first. Each record says how far
sampled rows are from a float64 reference. Writes JSON lines, one for each tile, to results/<device>/strip-tiles.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.cases import Case
from benchmarks.correctness import Answer, Inputs, sampled_error
from benchmarks.device import describe, device_name, results_folder
from benchmarks.methods import make_inputs
from benchmarks.timing import measure
from kernels.backend import Operands
from kernels.cuda import runtime, strip, strip_backward

CASES = [
    Case("56^2 h2", 128, (56, 56), 2, 32, (7, 7), rpb=True),
    Case("28^2 h4", 128, (28, 28), 4, 32, (7, 7), rpb=True),
    Case("14^2 h8", 128, (14, 14), 8, 32, (7, 7), rpb=True),
    Case("14^2 h12 d64", 128, (14, 14), 12, 64, (7, 7), rpb=True),
]


@contextmanager
def only(family: ModuleType, tile: object) -> Iterator[None]:
    """Has a kernel family cut maps by this tile, and no tuning choose another."""
    with patch.object(family, "choose_tile", lambda *_: tile), patch.dict(os.environ, FASTNA_TUNING="off"):
        family._prepared.cache_clear()
        yield
    family._prepared.cache_clear()


def forward_calls(case: Case, sets: list[Inputs]) -> list[Callable[[], tuple[Tensor, ...]]]:
    """The kernel's forward pass over each set of inputs, launches and nothing around them."""
    problem = case.problem(sets[0].query.device)

    def call_on(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        operands = Operands(inputs.query, inputs.key, inputs.value, inputs.rpb)
        bound = strip.bind_forward(problem, operands)
        return lambda: bound(*operands.tensors)

    return [call_on(inputs) for inputs in sets]


def backward_calls(case: Case, sets: list[Inputs]) -> list[Callable[[], tuple[Tensor, ...]]]:
    """The kernel's backward pass likewise, through outputs computed once, the bias gradient's sum included."""
    problem = case.problem(sets[0].query.device)

    def call_on(inputs: Inputs, forward: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        operands = Operands(inputs.query, inputs.key, inputs.value, inputs.rpb)
        rest = (*forward(), inputs.grad_output, None)
        bound = strip_backward.bind_backward(problem, operands, *rest, needs_rpb_grad=True)

        def call() -> tuple[Tensor, ...]:
            gradients = bound(*operands.tensors, *rest)
            assert gradients.rpb is not None
            return gradients.query, gradients.key, gradients.value, gradients.rpb

        return call

    return [call_on(inputs, forward) for inputs, forward in zip(sets, forward_calls(case, sets), strict=True)]


def run(case: Case, direction: str, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One record per tile, the fastest first."""
    problem, properties = case.problem(device), runtime.properties(device)
    sets = [make_inputs(case, device, seed, gradient=False) for seed in range(3 if device.type == "cuda" else 1)]
    if direction == "forward":
        tiles: list[Any] = strip.candidate_tiles(problem, properties)
        family, make = strip, forward_calls
    else:
        tiles = strip_backward.candidate_tiles(problem, True, properties)
        family, make = strip_backward, backward_calls
    output = forward_calls(case, sets[:1])[0]()[0]
    calls, errors = {}, {}
    for tile in tiles:
        with only(family, tile):
            calls[str(tile)] = make(case, sets)
        found = calls[str(tile)][0]()
        answer = Answer(found[0], None) if direction == "forward" else Answer(output, found[:3])
        errors[str(tile)] = sampled_error(case, sets[0], answer)
    timings = measure(calls, device, seconds)
    ceilings = floors.CEILINGS.get(device_name(device))
    for text, timing in sorted(timings.items(), key=lambda item: item[1].median):
        record = {"case": case.name, "direction": direction, "tile": text, "default": text == str(tiles[0])}
        record |= {"seconds": timing.median, "low": timing.low, "high": timing.high, "error": errors[text]}
        if ceilings:
            record["floor_share"] = floors.floor_seconds(problem, ceilings, direction) / timing.median
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], help="only these layers")
    parser.add_argument("--seconds", type=float, default=0.1, help="how long each tile is timed")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    path = results_folder(device) / "strip-tiles.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(json.dumps({"suite": "strip tiles", "environment": describe(device)}) + "\n")
        for case in CASES:
            if options.case and case.name not in options.case:
                continue
            for direction in options.direction:
                for record in run(case, direction, device, options.seconds):
                    file.write(json.dumps(record) + "\n")
                    share = f"{record['floor_share']:6.1%} of the floor" if "floor_share" in record else ""
                    print(
                        f"{case.name:14s} {direction:9s}{record['seconds'] * 1e6:9.1f} us {share}  {record['tile']}",
                        flush=True,
                    )
    print(f"results: {path}")


if __name__ == "__main__":
    main()
