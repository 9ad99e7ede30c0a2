#!/usr/bin/env python3
"""Times neighborhood-attention kernels and their peers on one problem, a named suite, or several suites.

    python scripts/benchmark_kernels.py --suite floors --direction forward backward
    python scripts/benchmark_kernels.py --space 56 56 --window 7 7 --batch 128 --heads 2 --head-dim 32 --rpb

Every answer, gradients included, is checked before it is timed. Results are JSON lines under results/<device>/, and an
interrupted sweep goes on where it stopped; `--fresh` starts again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import summary, sweep
from benchmarks.cases import DTYPES, SUITES, Case, adapt, suite
from benchmarks.device import results_folder
from benchmarks.methods import METHODS, default_methods
from benchmarks.summary import BASELINES
from benchmarks.terminal import console, show


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=[], help="named suites of problems")
    parser.add_argument("--quick", action="store_true", help="a selection of each suite that takes minutes")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(METHODS), help="backends and peers (default: all that this device has)"
    )
    parser.add_argument("--direction", nargs="+", choices=("forward", "backward", "both"), default=["forward"])
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), help="replace the suites' own dtypes")
    parser.add_argument(
        "--batch", type=int, help="replace the suites' batch (default: 1 on a CPU, the suites' own on a GPU)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.1, help="how long each method is timed on each problem")
    parser.add_argument("--minutes", type=float, help="begin no new problem after so long")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results of the same suites")
    problem = parser.add_argument_group("one problem")
    problem.add_argument("--space", type=int, nargs="+", help="tokens per axis, one to three")
    problem.add_argument("--window", type=int, nargs="+")
    problem.add_argument("--dilation", type=int, nargs="+", default=[])
    problem.add_argument("--stride", type=int, nargs="+", default=[])
    problem.add_argument("--causal", type=int, nargs="+", choices=(0, 1), default=[])
    problem.add_argument("--heads", type=int, default=1)
    problem.add_argument("--head-dim", type=int, default=32)
    problem.add_argument("--rpb", action="store_true")
    parsed = parser.parse_args()
    if bool(parsed.suite) == bool(parsed.space):
        parser.error("say either --suite NAME or one problem by --space and --window")
    if parsed.space and (not parsed.window or len(parsed.window) != len(parsed.space)):
        parser.error(f"--window {parsed.window}: needs one number for each of the {len(parsed.space)} axes of --space")
    return parsed


def chosen_cases(options: argparse.Namespace, device: torch.device) -> dict[str, list[Case]]:
    """The problem or the suites asked for, in the batch and the dtypes asked for, each problem once."""
    if options.space:
        case = Case(
            "one problem", options.batch or 1, tuple(options.space), options.heads, options.head_dim,
            tuple(options.window), tuple(options.dilation), tuple(options.stride), tuple(map(bool, options.causal)),
            rpb=options.rpb,
        )  # fmt: skip
        suites = {"one": [case]}
    else:
        suites = {name: suite(name, options.quick) for name in options.suite}
    batch = options.batch or (1 if device.type == "cpu" else None)
    return {name: adapt(cases, batch, options.dtype or ()) for name, cases in suites.items()}


def print_results(name: str, path: Path, directions: Sequence[str]) -> None:
    """What `path` holds of suite `name`: times, improvements, and what was not timed."""
    frame, _ = summary.load([path])
    if frame.empty:
        return
    target = console()
    for direction in directions:
        times = summary.case_table(frame, direction).drop(columns="suite")
        show(target, f"{name}, {direction}, microseconds", times)
    gains = [summary.improvements(frame, over) for over in BASELINES] + [summary.precision_gains(frame)]
    for table in gains:
        if len(table):
            show(target, f"{name}: improvement over {table['over'].iloc[0]}, %", table.drop(columns=["suite", "over"]))
    problems = frame[~frame["status"].isin(["ok"]) & ~frame["status"].str.startswith("unsupported")]
    for record in problems.drop_duplicates(["key", "method"]).to_dict("records"):
        target.print(f"[yellow]{record['name']}: {record['method']}: {record['status']}")
    target.print(f"results: {path}")


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    methods = options.methods or default_methods(device)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    folder = options.output or results_folder(device)
    left = 0
    for name, cases in chosen_cases(options, device).items():
        path = folder / f"kernels-{name}.jsonl"
        if options.fresh or name == "one":
            path.unlink(missing_ok=True)
        sweep.run(name, cases, methods, device, options.direction, path, options.seconds, deadline)
        left += len(sweep.pending(cases, methods, options.direction, path))
        print_results(name, path, options.direction)
    if left:
        print(f"{left} problems are left: the same command goes on")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on")
