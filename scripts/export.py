#!/usr/bin/env python3
"""Hands a trained model on, class names and preprocessing included.

    python scripts/export.py outputs/run/.../best.ckpt --output exported
    python scripts/export.py nat_tiny.pth --model nat_tiny --output exported --format timm pt2 onnx
    python scripts/export.py outputs/run/.../best.ckpt --output exported --push USER/NAME

timm: model.safetensors, config.json and README.md (a model card); timm.create_model("local-dir:exported",
pretrained=True) loads them after `import models`. pt2: torch.export. onnx: checked with onnxruntime. Both run without
this project and take batches of any size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from training.errors import UserError
from training.export.graph import trace, write_onnx, write_program
from training.export.hub import push_to_hub, save_folder
from training.inference.loading import load_model

FORMATS = ("timm", "pt2", "onnx")


def arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="what train.py wrote, local-dir:FOLDER, or with --model bare weights")
    parser.add_argument("--model", help="architecture of a file of bare weights")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["timm"])
    parser.add_argument("--license", default="mit", help="of the weights, as Hugging Face spells it")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload to the Hugging Face hub; log in first")
    parser.add_argument("--private", action="store_true", help="the repository made by --push")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their average")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> None:
    options = arguments(command_line)
    try:
        run(options, Console(soft_wrap=True, highlight=False, markup=False))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def run(options: argparse.Namespace, console: Console) -> None:
    loaded = load_model(options.checkpoint, options.model, averaged=not options.no_ema)
    console.print(f"{loaded.name}, {len(loaded.classes)} classes, {loaded.preprocessing.image_size} px")
    if "timm" in options.format:
        for path in save_folder(loaded, options.output, options.license):
            console.print(f"wrote {path}")
    if {"pt2", "onnx"} & set(options.format):
        program = trace(loaded)
        for suffix, write in (("pt2", write_program), ("onnx", write_onnx)):
            if suffix in options.format:
                path = options.output / f"model.{suffix}"
                error = write(loaded, program, path)
                console.print(f"wrote {path}, within {error:.1e} of the model")
    if options.push is not None:
        console.print(f"pushed {push_to_hub(loaded, options.push, options.license, options.private)}")


if __name__ == "__main__":
    main()
