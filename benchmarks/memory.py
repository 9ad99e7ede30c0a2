"""How much memory a call of the operator holds at most on a CPU, from PyTorch's own records of each allocation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels import na2d

WINDOW = 7
HEAD_DIM = 32
LAYER = (8, 56, 2)
"""Batch, side and heads of the first level of NAT and DiNAT at 224 px."""
GROWING = tuple((1, side, 1) for side in (64, 128, 256, 512))

Record = dict[str, str | int | float]


def peak_of(call: Callable[[], object]) -> int:
    """Most bytes that tensors made by `call` take at a time on a CPU, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    total = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def peak_bytes(batch: int, side: int, heads: int, backward: bool) -> tuple[int, int]:
    """Most bytes that a call in float32 holds at a time, operands (and gradients, with `backward`) included, and the
    bytes of query, key, value and output: what dense attention reads and writes."""
    leaves = [torch.randn(batch, side, side, heads, HEAD_DIM, requires_grad=backward) for _ in range(3)]
    grad_output = torch.ones_like(leaves[0])

    def call() -> None:
        output: Tensor = na2d(*leaves, WINDOW, backend="tiled")
        if backward:
            output.backward(grad_output)

    peak, size = peak_of(call), leaves[0].nbytes
    if peak < size:
        raise RuntimeError("the profiler recorded no allocations")
    return peak + (4 if backward else 3) * size, 4 * size


def measure() -> Iterator[Record]:
    """One record per problem and direction: the layer that the goal is set for, then maps that grow."""
    for batch, side, heads in (LAYER, *GROWING):
        for direction in ("forward", "backward"):
            peak, dense = peak_bytes(batch, side, heads, direction == "backward")
            yield {
                "suite": "memory",
                "map": f"{side} x {side}, batch {batch}, heads {heads}",
                "direction": direction,
                "operands_bytes": dense,
                "peak_bytes": peak,
            }
