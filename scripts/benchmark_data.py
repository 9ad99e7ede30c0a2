#!/usr/bin/env python3
"""Times every reader of images on one core: images/s, and the step that holds it up.

    python scripts/benchmark_data.py                        # on 256 JPEGs of 500 x 375 that it makes
    python scripts/benchmark_data.py --root photos --readers folder shards --workers 4 8

Decoders: pil; draft (PIL, JPEGs decoded at a fraction of their size); torchvision (workers only decode, and the
device augments: augmentation.runs_on=device). Results go to results/<device>/data.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import data
from benchmarks.device import describe, results_folder
from benchmarks.summary import format_number
from training.config import AugmentationConfig
from training.errors import UserError

# The published ImageNet-1k recipe, as configs/augmentation/imagenet.yaml has it.
IMAGENET = {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="class folders of pictures (default: pictures made for this)")
    parser.add_argument("--readers", nargs="+", choices=data.READERS, default=list(data.READERS))
    parser.add_argument("--decoders", nargs="+", choices=data.DECODERS, default=list(data.DECODERS))
    parser.add_argument("--workers", nargs="*", type=int, default=[], help="time whole epochs with so many workers too")
    parser.add_argument("--pictures", type=int, default=256, help="how many to make")
    parser.add_argument("--size", type=int, default=224, help="of the images after augmentation, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, help="folder of data.jsonl (default: results/<device>)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = data.Recipe(options.size, options.batch, AugmentationConfig(**IMAGENET))
    with tempfile.TemporaryDirectory() as scratch:
        root = options.root
        if root is None:
            root = Path(scratch) / "pictures"
            data.write_pictures(root, options.pictures)
        measured = data.measure(options.readers, options.decoders, options.workers, root, Path(scratch), recipe, device)
        try:
            records = list(measured)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    path = (options.output or results_folder(device)) / "data.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in [{"environment": describe(device)}, *records]:
            file.write(json.dumps(record) + "\n")
    show(pd.DataFrame(records), device)
    print(f"written to {path}")


def show(frame: pd.DataFrame, device: torch.device) -> None:
    """The records as a table; times are microseconds per image."""
    table = Table(title=f"One core, copy to {device.type}; microseconds per image")
    shown = frame.drop(columns=["augmented_on", "image_size", "batch_size", "images"])
    for column in shown:
        name = column.removesuffix("_us").replace("images_per_second_per_core", "images/s per core")
        table.add_column(name.replace("_", " "), justify="left" if column in ("reader", "decoder") else "right")
    for row in shown.itertuples(index=False):
        table.add_row(*(value if isinstance(value, str) else format_number(float(value)) for value in row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
