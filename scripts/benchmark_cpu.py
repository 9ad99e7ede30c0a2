"""Images per second of nat_tiny and dinat_tiny against timm's Swin-T on this CPU.

    python scripts/benchmark_cpu.py                                 # 2 threads, batch 8, 224 px, float32
    python scripts/benchmark_cpu.py --threads 8 --models nat_mini nat_base

All models are timed in one run, in turn, round by round, so that whatever else the machine does hits them alike. Each
figure is the best round: on a shared machine noise only ever adds time. Prints a table and writes JSON lines, one for
the environment and one for each model and mode.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import timm
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import models.layers  # registers the models too
from benchmarks.device import describe, results_folder
from kernels.cpu import linear

BASELINE = "swin_tiny_patch4_window7_224"
LEFT_OUT = ", attention left out"
SAME_LIBRARY = ", linear layers as Swin-T's"
Record = dict[str, str | int | float]


def inference(name: str, batch: int, size: int) -> Callable[[], object]:
    model = timm.create_model(name, num_classes=1000, **_size(name, size)).eval()
    images = torch.randn(batch, 3, size, size)

    def step() -> None:
        with torch.inference_mode():
            model(images)

    return step


def training(name: str, batch: int, size: int) -> Callable[[], object]:
    model = timm.create_model(name, num_classes=1000, **_size(name, size)).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def step() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    return step


def attention_left_out(step: Callable[[], object]) -> Callable[[], object]:
    """The step of one of our models with the operator giving back its values: no attention could make it faster."""

    def bare() -> None:
        with mock.patch.object(models.layers, "na2d", lambda query, key, value, *_, **__: value):
            step()

    return bare


def same_library(step: Callable[[], object]) -> Callable[[], object]:
    """The step of one of our models with PyTorch's own linear layers, which Swin-T has: what attention alone makes."""

    def alike() -> None:
        with mock.patch.object(linear, "ONEDNN_IS_FASTER", False):
            step()

    return alike


def _size(name: str, size: int) -> dict[str, int]:
    return {"img_size": size} if name == BASELINE else {}


def best_of_rounds(steps: dict[str, Callable[[], object]], rounds: int, seconds: float) -> tuple[dict[str, float], int]:
    """Seconds of the fastest call of each step, and the number of rounds timed.

    All are called in turn, first once untimed, then `rounds` times, or fewer (one at least) if `seconds` run out.
    """
    best = dict.fromkeys(steps, float("inf"))
    deadline = time.monotonic() + seconds
    for step in steps.values():
        step()
    timed = 0
    while not timed or (timed < rounds and time.monotonic() < deadline):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
        timed += 1
    return best, timed


def measure(names: Sequence[str], batch: int, size: int, rounds: int, seconds: float) -> Iterator[Record]:
    """One record per mode and model; the baseline's comes first in each mode."""
    for mode, build in (("inference", inference), ("training", training)):
        steps = {name: build(name, batch, size) for name in (BASELINE, *names)}
        if linear.ONEDNN_IS_FASTER:
            steps |= {f"{name}{SAME_LIBRARY}": same_library(steps[name]) for name in names}
        steps |= {f"{name}{LEFT_OUT}": attention_left_out(steps[name]) for name in names}
        best, timed = best_of_rounds(steps, rounds, seconds / 2)
        for name, fastest in best.items():
            yield {
                "suite": "cpu",
                "model": name,
                "mode": mode,
                "threads": torch.get_num_threads(),
                "batch": batch,
                "size": size,
                "rounds": timed,
                "images_per_second": batch / fastest,
                "of_baseline": best[BASELINE] / fastest,
            }


def table(records: Sequence[Record], title: str) -> Table:
    """A row per model: images/s and their ratio to the baseline's, in inference and in training."""
    shown = Table("model", title=title)
    rows: dict[str, list[str]] = {}
    for record in records:
        cells = rows.setdefault(str(record["model"]), [])
        cells += [f"{record['images_per_second']:.1f}", f"{record['of_baseline']:.2f}"]
    for mode in ("inference", "training"):
        shown.add_column(f"{mode}, images/s", justify="right")
        shown.add_column("of Swin-T", justify="right")
    for name, cells in rows.items():
        shown.add_row(name, *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nat_tiny", "dinat_tiny"], help="besides the baseline")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=120, help="after which no further round starts, all in all")
    parser.add_argument("--output", type=Path, help="JSON lines (default: cpu.jsonl in this processor's results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    device = torch.device("cpu")
    records = list(measure(options.models, options.batch, options.size, options.rounds, options.seconds))
    title = f"{options.threads} threads, batch {options.batch}, {options.size} px, float32"
    Console().print(table(records, title))
    path = options.output or results_folder(device) / "cpu.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"suite": "cpu", "environment": describe(device)}, *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
