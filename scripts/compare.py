#!/usr/bin/env python3
"""Compares two models on the same images: agreement, McNemar's test, classes, and the images where they differ.

    python scripts/compare.py first/checkpoints/best.ckpt second/checkpoints/best.ckpt --output comparison
    python scripts/compare.py nat_tiny.pth best.ckpt --model nat_tiny --data val/ --output comparison

Models are given as to scripts/predict.py; --model is the architecture of whichever is a file of bare weights. Images
are those of --data (FOLDER/CLASS/IMAGE), else of the first checkpoint's own data. Each model prepares them its own way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.data import Images, open_splits
from training.data.decode import Decoder
from training.data.folder import scan
from training.errors import ConfigError, UserError
from training.evaluation import Predictions
from training.files import make_folder
from training.inference.compare import Comparison, answer, compare, require_same_classes, write_comparison
from training.inference.loading import Loaded, load_model
from training.inference.predict import PRECISIONS, Runner

BARE = (".pth", ".pt", ".bin", ".safetensors")


def arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="file, folder or name")
    parser.add_argument("second", help="file, folder or name")
    parser.add_argument("--model", help=f"architecture of bare weights ({' '.join(BARE)})")
    parser.add_argument("--data", type=Path, help="folder of class folders")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="of its own data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the page and the tables")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="32-true")
    parsed = parser.parse_args(command_line)
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(parsed, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(parsed, name)}: must be {least} or more")
    return parsed


def main(command_line: Sequence[str] | None = None) -> None:
    options = arguments(command_line)
    try:
        run(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def run(options: argparse.Namespace) -> None:
    console = Console(markup=False)
    sources = (options.first, options.second)
    first, second = (load_model(s, options.model if Path(s).suffix in BARE else None) for s in sources)
    require_same_classes(first, second)
    images = chosen_images(options, first)
    make_folder(options.output)  # refused now, not after both have answered
    runners = [Runner(loaded, options.device, options.precision) for loaded in (first, second)]
    answers: list[Predictions] = []
    with Progress(console=console) as progress:
        for runner in runners:
            task = progress.add_task(runner.loaded.name, total=len(images.targets))
            advance = partial(progress.advance, task)
            predictions, broken = answer(runner, images, options.batch_size, options.workers, advance)
            answers.append(predictions)
    comparison = compare(first, second, (answers[0], answers[1]), images)
    console.print(show(comparison))
    console.print(sentence(comparison), soft_wrap=True, highlight=False)
    page = write_comparison(comparison, images, options.output)
    for image in broken:
        print(f"unreadable: {image.label}: {image.reason}", file=sys.stderr)
    console.print(f"comparison: {page}", soft_wrap=True, highlight=False)


def chosen_images(options: argparse.Namespace, first: Loaded) -> Images:
    if options.data is not None:
        return scan(options.data, first.classes, Decoder())
    if first.run is None:
        raise ConfigError(f"{options.first} does not say what it was trained on; give --data FOLDER")
    return getattr(open_splits(first.preprocessing), options.split)


def show(comparison: Comparison) -> Table:
    table = Table(title="images that each classifies correctly")
    table.add_column("", justify="left")
    table.add_column("second right", justify="right")
    table.add_column("second wrong", justify="right")
    table.add_row("first right", str(comparison.both), str(comparison.only_first))
    table.add_row("first wrong", str(comparison.only_second), str(comparison.neither))
    return table


def sentence(comparison: Comparison) -> str:
    summary = comparison.summary
    return (
        f"top-1 {100 * summary['top1_first']:.2f} % and {100 * summary['top1_second']:.2f} % of {comparison.images}"
        f" images, agreement {100 * comparison.agreement:.2f} %, McNemar p = {comparison.p_value:.3g}"
    )


if __name__ == "__main__":
    main()
