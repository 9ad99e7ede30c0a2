#!/usr/bin/env python3
"""Times LayerNorm, ours and PyTorch's, on the rows of our models: the share of the memory floor, and the host's time.

    python scripts/benchmark_norm.py                    a minute; results/<device>/layer-norm.jsonl

`bf16`: everything is bfloat16. `autocast`: x and the weights are float32, a linear layer reads the result; PyTorch's
time includes that layer's rounding. Backward calls go through autograd. The floor is the bytes of x, the output and
their gradients over the device's bandwidth; inputs are rotated, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.device import describe, results_folder
from benchmarks.timing import measure
from kernels.layer_norm import LayerNorm

CASES = {
    "56^2 c64": (128 * 56 * 56, 64),
    "28^2 c128": (128 * 28 * 28, 128),
    "14^2 c256": (128 * 14 * 14, 256),
    "7^2 c512": (128 * 7 * 7, 512),
    "56^2 c96": (128 * 56 * 56, 96),
    "14^2 c384": (128 * 14 * 14, 384),
    "14^2 c768": (128 * 14 * 14, 768),
    "14^2 c1024": (64 * 14 * 14, 1024),
    "7^2 c2048": (64 * 7 * 7, 2048),
}
ROTATED_BYTES = 400e6  # several times what an L2 cache holds
HOST_CALLS = 2000

Call = Callable[[], object]


def calls_on(layer: nn.Module, mode: str, rows: int, channels: int, device: torch.device) -> tuple[Call, Call, float]:
    """A forward call without gradients, a backward call, and how many bytes the forward call moves at least."""
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    x = torch.randn(rows, channels, device=device).to(dtype).requires_grad_()

    def output() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=mode == "autocast"):
            result: Tensor = layer(x)
        return result.to(torch.bfloat16)

    @torch.no_grad()
    def forward() -> Tensor:
        return output()

    recorded = output()
    gradient = torch.randn_like(recorded)
    leaves = [x, *layer.parameters()]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(recorded, leaves, gradient, retain_graph=True)

    return forward, backward, x.numel() * (x.element_size() + 2)


def run(name: str, mode: str, device: torch.device, seconds: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    rows, channels = CASES[name]
    size = 4 if mode == "bf16" else 6
    sets = max(3, int(ROTATED_BYTES / (rows * channels * size))) if device.type == "cuda" else 1
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    layers = {
        "fastna": LayerNorm(channels, device=device, dtype=dtype, feeds_linear=True),
        "torch": nn.LayerNorm(channels, device=device, dtype=dtype),
    }
    timed: dict[str, dict[str, Sequence[Call]]] = {"forward": {}, "backward": {}}
    for method, layer in layers.items():
        made = [calls_on(layer, mode, rows, channels, device) for _ in range(sets)]
        timed["forward"][method] = [forward for forward, _, _ in made]
        timed["backward"][method] = [backward for _, backward, _ in made]
    moved = {"forward": size, "backward": 6 if mode == "bf16" else 10}
    for direction, calls in timed.items():
        floor = rows * channels * moved[direction] / bandwidth
        for method, timing in measure(calls, device, seconds).items():
            record = {"case": name, "mode": mode, "direction": direction, "method": method}
            yield record | {"seconds": timing.median, "low": timing.low, "high": timing.high, "floor": floor}


def host_seconds(layer: nn.Module, device: torch.device) -> float:
    """Of a call without gradients that is too small for the device to matter."""
    x = torch.randn(49, 64, device=device)
    with torch.no_grad():
        for _ in range(100):
            layer(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(HOST_CALLS):
            layer(x)
    return (time.perf_counter() - started) / HOST_CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--mode", nargs="+", choices=("bf16", "autocast"), default=["bf16", "autocast"])
    parser.add_argument("--seconds", type=float, default=0.05, help="how long each call is timed")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    bandwidth = floors.ceilings_of(device, [torch.bfloat16]).bytes_per_second
    path = results_folder(device) / "layer-norm.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(json.dumps({"suite": "layer norm", "environment": describe(device)}) + "\n")
        for name, mode in itertools.product(options.case, options.mode):
            for record in run(name, mode, device, options.seconds, bandwidth):
                file.write(json.dumps(record) + "\n")
                share = f"{record['floor'] / record['seconds']:6.1%} of the floor"
                print(
                    f"{name:12s} {mode:9s}{record['direction']:9s}{record['method']:7s}"
                    f"{record['seconds'] * 1e6:9.1f} us {share}",
                    flush=True,
                )
    for layer in (LayerNorm(64, device=device), nn.LayerNorm(64, device=device)):
        print(f"host, {type(layer).__module__}: {host_seconds(layer, device) * 1e6:.1f} us a call")
    print(f"results: {path}")


if __name__ == "__main__":
    main()
