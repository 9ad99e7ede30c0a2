#!/usr/bin/env python3
"""Time and memory of what people do here, each as the command that they would type, start-up included.

    python scripts/benchmark_tasks.py
    python scripts/benchmark_tasks.py --tasks "train" "export: timm" --pictures 32

Memory is the peak of the command's own process. Results go to results/<device>/tasks.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import timm
import torch
from rich.console import Console

import models  # noqa: F401  (registers the models)
from benchmarks import report, summary
from benchmarks.data import write_pictures
from benchmarks.device import ROOT, describe, results_folder

TUNED = "tuned/checkpoints/best.ckpt"
TASKS = {
    "train": "train.py experiment=digits output_dir=digits",
    "fine-tune": "train.py experiment=finetune model=nat_mini model.checkpoint=nat_mini.pth data.root=pictures"
    " data.batch_size=8 data.workers=0 schedule.epochs=1 output_dir=tuned",
    "evaluate": f"eval.py ckpt={TUNED}",
    "predict": f"scripts/predict.py pictures --checkpoint {TUNED} --device cpu --output p.csv gallery.html",
    "export: timm": f"scripts/export.py {TUNED} --output exported",
    "export: pt2, onnx": f"scripts/export.py {TUNED} --output exported --format pt2 onnx",
}
WHAT = {
    "train": "20 epochs of 1,348 digits, 0.3 M weights, 32 px",
    "fine-tune": "one epoch of {pictures} pictures, nat_mini, 224 px",
    "evaluate": "a tenth of {pictures} pictures, report",
    "predict": "{pictures} pictures, CSV, gallery",
    "export: timm": "nat_mini",
    "export: pt2, onnx": "nat_mini, both checked",
}


def measure(command: str, folder: Path) -> tuple[float, float]:
    """Seconds, and peak resident memory in MiB, of one command in `folder`.

    Raises:
        SystemExit: it failed; says how.
    """
    script, *arguments = command.split()
    arguments += ["trainer.accelerator=cpu"] if script in ("train.py", "eval.py") else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "said.txt").open("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments], cwd=folder, env=environment, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            said.seek(0)
            sys.exit(f"{command}: ended with {os.waitstatus_to_exitcode(status)}\n{said.read()[-2000:]}")
    return seconds, used.ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="in this order")
    parser.add_argument("--pictures", type=int, default=64, help="how many are made, 500 x 375")
    parser.add_argument("--output", type=Path, help="folder of tasks.jsonl (default: results/<device>)")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    records: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "pictures", options.pictures)
        torch.save(timm.create_model("nat_mini").state_dict(), folder / "nat_mini.pth")
        for task in options.tasks:
            seconds, peak = measure(TASKS[task], folder)
            what = WHAT[task].format(pictures=options.pictures)
            records.append({"suite": "tasks", "task": task, "what": what, "seconds": seconds, "peak_mib": peak})
    path = (options.output or results_folder(device)) / "tasks.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"suite": "tasks", "environment": describe(device)}, *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Console().print(summary.markdown(report.task_table(pd.DataFrame(records))), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
