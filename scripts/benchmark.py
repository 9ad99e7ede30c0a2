#!/usr/bin/env python3
"""The whole evaluation by one command: kernels, experiments, workloads, models, then the report.

    python scripts/benchmark.py --minutes 10
    python scripts/benchmark.py --list

The most wanted figures come first; calling it again goes on where it stopped, so that short calls add up. Results are
JSON lines under results/<device>/, with report.html beside them. Where git is not at hand, the environment variable
FASTNA_COMMIT tells which commit is measured. Needs PyTorch, timm, pandas, rich and matplotlib; on a GPU, CuPy.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

from benchmarks import evaluation, report
from benchmarks.device import results_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing new after so long (default: 10)")
    parser.add_argument("--full", action="store_true", help="a thousand problems per sweep instead of a selection")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    options = parser.parse_args()
    started = time.monotonic()
    device, console = torch.device(options.device), Console()
    folder = options.output or results_folder(device)
    steps = evaluation.plan(device, folder, quick=not options.full)
    if options.list:
        for step in steps:
            console.print(f"{step.title}", highlight=False)
        return
    try:
        unfinished = evaluation.run(steps, 60 * options.minutes, console)
    except RuntimeError as error:
        left = options.minutes - (time.monotonic() - started) / 60
        if device.type != "cuda" or left < 0.5:
            raise
        # A kernel broke the device's context, which only a new process gets rid of; the results tell it where to go on.
        console.print(f"[red]{error}[/]\nbeginning again behind it", highlight=False)
        arguments = ["--minutes", str(left), "--device", options.device, "--output", str(folder)]
        os.execv(sys.executable, [sys.executable, __file__, *arguments, *["--full"] * options.full])
    if files := sorted(folder.glob("*.jsonl")):
        (folder / "report.html").write_text(report.build(files))
        console.print(f"report: {folder / 'report.html'}")
    for step in unfinished:
        console.print(f"not finished: {step.title}; the same command goes on", highlight=False)


if __name__ == "__main__":
    main()
