#!/usr/bin/env python3
"""Where a model's time goes, by kernel: a table, and a trace that opens in Perfetto (https://ui.perfetto.dev).

python scripts/profile_model.py nat_tiny --mode training --batch 64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models import DTYPES, Setting, device_times, share_of_attention, step_function


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="any timm name, this zoo's included")
    parser.add_argument("--mode", choices=("inference", "training"), default="inference")
    parser.add_argument("--backend", help="attention backend (default: what the dispatcher picks)")
    parser.add_argument("--batch", type=int, default=128 if cuda else 4)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bfloat16" if cuda else "float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--trace", type=Path, default=Path("outputs/profile.json"), help="where the trace goes")
    options = parser.parse_args()
    device = torch.device(options.device)
    setting = Setting(options.model, options.mode, options.backend, options.batch, options.precision, options.compile)
    step, images = step_function(setting, device)
    for _ in range(3):
        step(images)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
    options.trace.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(options.trace))
    rows = device_times(profile.key_averages(), device.type == "cuda")
    whole = sum(time for _, _, time in rows)
    attention = share_of_attention(profile.events(), device.type == "cuda")
    table = Table(title=f"{options.model}, {options.mode}, batch {options.batch}: {whole / 1e3:.2f} ms on {device}")
    for column in ("kernel or operator", "calls", "ms", "share"):
        table.add_column(column, justify="left" if column.startswith("kernel") else "right")
    for name, calls, time in rows[: options.rows]:
        table.add_row(name[:90], str(calls), f"{time / 1e3:.3f}", f"{time / whole:.1%}")
    Console().print(table)
    if attention is not None:
        print(f"attention: {attention:.1%}")
    print(f"trace: {options.trace}")


if __name__ == "__main__":
    main()
