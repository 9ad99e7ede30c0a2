#!/usr/bin/env python3
"""Times whole models, inference and training, with every attention backend; timm's other models for context.

    python scripts/benchmark_models.py                         # the paper's table
    python scripts/benchmark_models.py --models nat_tiny swin_tiny_patch4_window7_224 --mode inference training

Loading of data is excluded unless --images names a folder of pictures. Results go to results/<device>/models.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import timm
import torch
from torch import Tensor

from benchmarks import models, summary
from benchmarks.device import results_folder
from benchmarks.terminal import console, show

COLUMNS = {
    "model": "model",
    "mode": "mode",
    "backend": "backend",
    "precision": "precision",
    "batch_used": "batch",
    "compile": "compiled",
    "cuda_graph": "graph",
    "channels_last": "channels last",
    "loading": "loading",
    "images_per_second": "images/s",
    "ms_per_step": "ms/step",
    "latency_p50_ms": "p50 ms",
    "latency_p90_ms": "p90 ms",
    "latency_p99_ms": "p99 ms",
    "peak_GiB": "peak GiB",
    "attention_share": "attention",
    "status": "status",
}
COMMON = ("mode", "precision", "batch_used", "compile", "cuda_graph", "channels_last", "loading")


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", help="timm names (default: the paper's models, and three others for context)"
    )
    parser.add_argument("--mode", nargs="+", choices=("inference", "training"), default=["inference"])
    parser.add_argument("--backends", nargs="+", default=["fused", "gemm", "naive"] if cuda else ["native", "tiled"])
    parser.add_argument(
        "--precision", nargs="+", choices=sorted(models.DTYPES), default=["bfloat16"] if cuda else ["float32"]
    )
    parser.add_argument("--batch", type=int, default=128 if cuda else 4)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--cuda-graph", action="store_true", help="replay a step as one CUDA graph")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument(
        "--images", type=Path, help="folder of pictures: include loading, decoding and copying in the time"
    )
    parser.add_argument("--workers", type=int, default=4, help="loading processes, with --images")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each row is timed")
    parser.add_argument("--minutes", type=float, help="begin no new row after so long")
    parser.add_argument("--output", type=Path, help="file of the results (default: results/<device>/models.jsonl)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    if unknown := [name for name in options.models or () if not timm.is_model(name.split(".")[0])]:
        parser.error(f"--models {' '.join(unknown)}: not among timm.list_models(), which holds this zoo's too")
    return options


def loading(folder: Path, workers: int) -> models.Callable[[Tensor], Iterator[Tensor]]:
    """Batches decoded from the pictures in `folder`, without end, cast and sized like the example."""
    from timm.data import create_dataset, create_loader

    def stream(example: Tensor) -> Iterator[Tensor]:
        dataset = create_dataset("", root=str(folder))
        loader = create_loader(
            dataset,
            input_size=tuple(example.shape[1:]),
            batch_size=example.shape[0],
            is_training=True,
            num_workers=workers,
            use_prefetcher=example.device.type == "cuda",
            device=example.device,
        )
        while True:
            for images, _ in loader:
                if images.shape == example.shape:
                    yield images.to(example.device, example.dtype)

    return stream


def chosen(options: argparse.Namespace) -> list[models.Setting]:
    names = options.models or [*models.PAPER, *models.CONTEXT]
    rows = []
    for precision, mode in itertools.product(options.precision, options.mode):
        rows += models.settings(
            names, [mode], options.backends, batch=options.batch, precision=precision, compile=options.compile,
            channels_last=options.channels_last, cuda_graph=options.cuda_graph,
            loading=options.images is not None,
        )  # fmt: skip
    return rows


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    path = options.output or results_folder(device) / "models.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    batches = loading(options.images, options.workers) if options.images else None
    rows = chosen(options)
    models.run(rows, device, path, options.seconds, deadline, batches)
    frame, _ = summary.load([path], index=["suite", "key"])
    if len(frame):
        print_results(frame[frame["key"].isin({row.key for row in rows})], f"{device}")
    print(f"results: {path}")
    if left := len(models.pending(rows, path)):
        print(f"{left} rows are left: the same command goes on")


def print_results(frame: pd.DataFrame, title: str) -> None:
    """The table of `frame`'s rows; what all of them have in common stands in the title instead."""
    if "peak_bytes" in frame:
        frame = frame.assign(peak_GiB=pd.to_numeric(frame["peak_bytes"]) / 2**30)
    table = frame[[column for column in COLUMNS if column in frame]].rename(columns=COLUMNS)
    for column in (COLUMNS[name] for name in COMMON if COLUMNS[name] in table):
        values = table[column].unique()
        if len(values) == 1:
            value = table.pop(column).iloc[0]
            title += "" if value is False else f", {column}" if value is True else f", {column} {value}"
    show(console(), title, table)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on")
