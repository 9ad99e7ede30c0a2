#!/usr/bin/env python3
"""Does fine-tuning beat training from scratch? The digits 5-9 from 250 drawings, with and without learning 0-4 first.

    python scripts/transfer_digits.py                       # 5 seeds, about six minutes on one core
    python scripts/transfer_digits.py --seeds 2 --epochs 1 --pretraining-epochs 4

A seed draws the split, the 250 drawings, the first weights and the augmentation. Both sides get the same epochs and try
the same learning rates; each is judged on the test drawings at the rate whose mean validation accuracy is best.
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
from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks import summary
from benchmarks.device import describe, results_folder
from training.checkpoint import BEST, FOLDER, read_run
from training.config import CONFIG_DIRECTORY, TrainConfig, register_schemas, to_object
from training.run import Outcome, train

RATES = (2e-3, 4e-3, 8e-3)


def run(experiment: str, folder: Path, seed: int, *overrides: str) -> Outcome:
    """What `python train.py experiment=...` does, in this process, so that fifty short runs start once."""
    where = [f"output_dir={folder}", "logger=csv", f"seed={seed}", f"data.split_seed={seed}"]
    with initialize_config_dir(CONFIG_DIRECTORY, version_base="1.3"):
        config = compose("train", [f"experiment={experiment}", *where, *overrides])
    return train(to_object(config, TrainConfig))


def compare(
    folder: Path, seed: int, rates: Sequence[float], epochs: Sequence[int], pretraining_epochs: int
) -> list[dict[str, object]]:
    """A record for each side, number of epochs and learning rate: top-1 of the best checkpoint."""
    run("digits_pretrain", folder / "pretrain", seed, f"schedule.epochs={pretraining_epochs}")
    sides = {"from scratch": [], "fine-tuned": [f"model.checkpoint={folder}/pretrain/{FOLDER}/{BEST}"]}
    records: list[dict[str, object]] = []
    for number in epochs:
        for side, weights in sides.items():
            for rate in rates:
                place = folder / f"{side.replace(' ', '-')}-{number}-{rate}"
                budget = [f"schedule.epochs={number}", f"optimizer.lr={rate}"]
                outcome = run("digits_transfer", place, seed, *weights, *budget)
                assert outcome.figures is not None
                records.append(
                    {
                        "suite": "transfer-digits",
                        "side": side,
                        "seed": seed,
                        "epochs": number,
                        "rate": rate,
                        "val_top1": read_run(place / FOLDER / BEST).best_value,
                        "test_top1": outcome.figures.top1,
                    }
                )
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare over some seeds; print a table, write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of comparisons")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 8], help="of fine-tuning; one is ten updates")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates that are tried")
    parser.add_argument("--pretraining-epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, help="folder of transfer-digits.jsonl (default: results/<device>)")
    options = parser.parse_args(arguments)
    register_schemas()
    records: list[dict[str, object]] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            records += compare(Path(folder), seed, options.rates, options.epochs, options.pretraining_epochs)
    device = torch.device("cpu")
    path = (options.output or results_folder(device)) / "transfer-digits.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for record in [{"environment": describe(device)}, *records]:
            file.write(json.dumps(record) + "\n")
    Console().print(summary.markdown(summary.transfer_table(pd.DataFrame(records))), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
