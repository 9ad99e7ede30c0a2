#!/usr/bin/env python3
"""Says what images show: an image, a folder, a pattern or tar shards, with any checkpoint.

    python scripts/predict.py photos/ --checkpoint outputs/run/.../best.ckpt --output predictions.csv gallery.html
    python scripts/predict.py 'photos/**/*.jpg' shard-{000..003}.tar --checkpoint nat_tiny.pth --model nat_tiny

--checkpoint takes what train.py or scripts/export.py wrote, local-dir:FOLDER, hf-hub:USER/NAME, or with --model a file
of bare weights. --model alone fetches the published weights. Images that cannot be read are listed and left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from training.errors import UserError
from training.files import make_folder
from training.inference.gallery import Gallery
from training.inference.loading import Loaded, load_model
from training.inference.predict import PRECISIONS, TABLES, Prediction, Runner, predict, write_table
from training.inference.sources import list_sources

SHOWN = 20  # images in the terminal's table


def arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, folders, patterns, tar shards")
    parser.add_argument("--checkpoint", help="file or folder (see above)")
    parser.add_argument("--model", help="architecture of a file of bare weights; alone, a model with published weights")
    parser.add_argument(
        "--output", nargs="+", type=Path, default=[], help="files to write: .csv .json .parquet .html (a gallery)"
    )
    parser.add_argument("--top", type=int, default=5, help="classes named for each image")
    parser.add_argument("--gallery-images", type=int, default=100, help="images shown in a gallery")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="32-true")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their average")
    parsed = parser.parse_args(command_line)
    if parsed.checkpoint is None and parsed.model is None:
        parser.error("say which model: --checkpoint PATH, or --model NAME for published weights")
    for path in parsed.output:
        if path.suffix not in (*TABLES, ".html"):
            parser.error(f"--output {path}: the name must end in {', '.join(TABLES)} or .html")
    for name, least in (("top", 1), ("batch_size", 1), ("workers", 0), ("gallery_images", 0)):
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
    console = Console(markup=False)  # names of files and classes may hold brackets
    sources = list_sources(options.images)
    if options.checkpoint is None:
        loaded = load_model(options.model)
    else:
        loaded = load_model(options.checkpoint, options.model, averaged=not options.no_ema)
    for path in options.output:
        make_folder(path.parent)  # refused now, not after an hour of predicting
    runner = Runner(loaded, options.device, options.precision)
    gallery = Gallery(runner, options.gallery_images if any(p.suffix == ".html" for p in options.output) else 0)
    stream = predict(
        runner,
        sources,
        top=options.top,
        batch_size=options.batch_size,
        workers=options.workers,
        watch=gallery.watch,
    )
    predictions: list[Prediction] = []
    speed = TextColumn("{task.completed} images, {task.fields[speed]:.0f}/s")
    with Progress(TextColumn("{task.description}"), BarColumn(), speed, TimeElapsedColumn(), console=console) as bar:
        task, start = bar.add_task(loaded.name, total=None, speed=0.0), time.monotonic()
        for prediction in stream:
            predictions.append(prediction)
            bar.update(task, advance=1, speed=len(predictions) / (time.monotonic() - start))
    predictions.sort(key=lambda prediction: prediction.place)
    if not options.output:
        console.print(show(predictions, loaded))
    for path in options.output:
        if path.suffix == ".html":
            gallery.write(path, predictions)
        else:
            write_table(path, predictions, loaded)
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    unreadable = [prediction for prediction in predictions if prediction.error is not None]
    for prediction in unreadable:
        print(f"unreadable: {prediction.label}: {prediction.error}", file=sys.stderr)
    console.print(f"{len(predictions) - len(unreadable)} images predicted, {len(unreadable)} unreadable")


def show(predictions: list[Prediction], loaded: Loaded) -> Table:
    """The first predictions for the terminal."""
    readable = [prediction for prediction in predictions if prediction.error is None]
    table = Table(title=loaded.source, caption=f"the first {SHOWN} of {len(readable)}" if len(readable) > SHOWN else "")
    table.add_column("image", overflow="fold")
    table.add_column("classes, most probable first", overflow="fold")
    for prediction in readable[:SHOWN]:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        table.add_row(prediction.label, ", ".join(f"{loaded.readable(i)} {100 * p:.1f} %" for i, p in pairs))
    return table


if __name__ == "__main__":
    main()
