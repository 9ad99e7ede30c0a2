"""Images per second of nat_tiny and dinat_tiny against timm's Swin-T on this CPU, as a Markdown table.

    python scripts/benchmark_cpu.py                                 # 2 threads, batch 8, 224 px, float32
    python scripts/benchmark_cpu.py --threads 8 --models nat_mini nat_base

All models are timed in one run, in turn, round by round, so that whatever else the machine does hits them alike. Each
figure is the best round: on a shared machine noise only ever adds time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import models  # noqa: F401  (registers the models)

BASELINE = "swin_tiny_patch4_window7_224"


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


def _size(name: str, size: int) -> dict[str, int]:
    return {"img_size": size} if name == BASELINE else {}


def best_of_rounds(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest call of each, all called in turn `rounds` times after one that is not timed."""
    best = dict.fromkeys(steps, float("inf"))
    for index in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def table(names: Sequence[str], batch: int, size: int, rounds: int) -> str:
    """Markdown: a row per model, images/s its ratio to the baseline's, in inference and in training."""
    columns = {}
    for kind in (inference, training):
        columns[kind] = best_of_rounds({name: kind(name, batch, size) for name in names}, rounds)
    lines = ["| model | inference, images/s | of Swin-T | training, images/s | of Swin-T |", "|---|---|---|---|---|"]
    for name in names:
        cells = [name]
        for seconds in columns.values():
            cells += [f"{batch / seconds[name]:.1f}", f"{seconds[BASELINE] / seconds[name]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nat_tiny", "dinat_tiny"], help="besides the baseline")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} threads, batch {options.batch}, {options.size} px, best of {options.rounds} rounds\n")
    print(table([BASELINE, *options.models], options.batch, options.size, options.rounds))


if __name__ == "__main__":
    main()
