"""Peak memory of the pure PyTorch backend on a CPU: on a layer of NAT, and on maps that grow to 512 x 512.

    python scripts/benchmark_memory.py

Window 7 x 7, head_dim 32, float32. Prints a table and writes JSON lines, one for the environment and one for each
problem and direction.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import memory, report, summary
from benchmarks.device import describe, results_folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON lines (default: memory.jsonl in this processor's results)")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    path = options.output or results_folder(device) / "memory.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"suite": "memory", "environment": describe(device)}, *memory.measure()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(summary.markdown(report.tables([path])["memory"]))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
