"""The least time a problem can take on a device: bytes over memory bandwidth, or operations over the matrix rate."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.device import device_name
from benchmarks.timing import measure
from kernels.cpu.linear import linear  # by the faster of a CPU's libraries
from kernels.problem import Axis, Problem


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: bytes/s of a large copy, read and written, and FLOP/s by dtype of a large product."""

    bytes_per_second: float
    flops_per_second: dict[torch.dtype, float]


# H200: copy and bf16 product measured; float32 is the datasheet's FFMA rate (exact float32, no TF32).
CEILINGS = {
    "NVIDIA H200": Ceilings(4.3e12, {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 60e12}),
}

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}


@functools.cache
def _measured_bandwidth(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure({"": [lambda: target.copy_(source)]}, device)[""].low


@functools.cache
def _measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = PRODUCT_SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)  # ones draw less power, and run at higher clocks
    return 2 * side**3 / measure({"": [lambda: linear(left, right)]}, device)[""].low


def ceilings_of(device: torch.device, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """What `device` can do in `dtypes`: from `CEILINGS`, or measured once, a large copy and a large product for each.

    A CPU without products in 16 bits computes them in float32: the faster of both is its rate.
    """
    if known := CEILINGS.get(device_name(device)):
        return known
    slowest = [torch.float32] if device.type == "cpu" else []
    rates = {dtype: max(_measured_rate(device, d) for d in (dtype, *slowest)) for dtype in dtypes}
    return Ceilings(_measured_bandwidth(device), rates)


def as_facts(ceilings: Ceilings) -> dict[str, float]:
    """The ceilings as an environment's facts, which `ceilings_from` reads."""
    rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in ceilings.flops_per_second.items()}
    return {"bytes_per_second": ceilings.bytes_per_second, **rates}


def ceilings_from(facts: Sequence[Mapping[str, Any]]) -> Ceilings | None:
    """The ceilings that the facts of runs state of the last run's device, or that are known of it; None without any."""
    device = facts[-1]["device"] if facts else ""
    stated: dict[str, float] = {}
    for fact in facts:
        stated |= fact.get("ceilings", {}) if fact["device"] == device else {}
    if not stated:
        return CEILINGS.get(device)
    bandwidth = stated.pop("bytes_per_second")
    return Ceilings(bandwidth, {getattr(torch, name): rate for name, rate in stated.items()})


def pairs(axis: Axis) -> int:
    """(query, key) pairs along one axis, all dilation groups together."""
    total = 0
    for group in range(min(axis.dilation, axis.length)):
        length = axis.group_length(group)
        if not axis.causal:
            total += length * axis.window
            continue
        for position in range(length):
            start, end = axis.window_at(position, length)
            total += end - start
    return total


def forward_flops(problem: Problem) -> float:
    """Useful operations of a forward pass: two products per visible (query, key) pair. A backward pass has five."""
    visible = math.prod(pairs(axis) for axis in problem.axes) + problem.tokens * problem.additional
    return 2.0 * problem.batch * problem.heads * visible * (problem.head_dim + problem.value_dim)


def forward_bytes(problem: Problem) -> float:
    """Bytes of query, key, value read once and output written once. A backward pass moves twice as many, and lse."""
    query = problem.heads * (problem.head_dim + problem.value_dim)
    key = problem.key_heads * (problem.head_dim + problem.value_dim)
    return float(problem.batch * problem.tokens * (query + key) * problem.dtype.itemsize)


def factors(direction: str) -> tuple[float, float]:
    """Operations and bytes of `direction` (forward, backward or both), as multiples of a forward pass's.

    Raises:
        ValueError: another direction.
    """
    known = {"forward": (1.0, 1.0), "backward": (2.5, 2.0), "both": (3.5, 3.0)}
    if direction not in known:
        raise ValueError(f"direction={direction!r}: must be one of {', '.join(known)}")
    return known[direction]


def floor_seconds(problem: Problem, ceilings: Ceilings, direction: str) -> float:
    """The larger of the memory floor and the arithmetic floor; `direction` is forward, backward or both."""
    work, traffic = factors(direction)
    computing = work * forward_flops(problem) / ceilings.flops_per_second[problem.dtype]
    return max(traffic * forward_bytes(problem) / ceilings.bytes_per_second, computing)


@functools.cache
def tiles_along(axis: Axis, query_tile: int, key_tile: int) -> tuple[int, int]:
    """Query tiles along `axis`, and the key tiles that they all visit, each starting at its own union of windows."""
    queries = keys = 0
    for group in range(axis.dilation):
        length = axis.group_length(group)
        for first in range(0, length, query_tile):
            last = min(first + query_tile, length) - 1
            start = axis.window_at(first, length)[0]
            end = max(axis.window_at(position, length)[1] for position in range(first, last + 1))
            queries += 1
            keys += -(-(end - start) // key_tile)
    return queries, keys


def tile_waste(problem: Problem, query_tile: tuple[int, ...], key_tile: tuple[int, ...]) -> float:
    """(query, key) pairs that tiles of these boxes multiply, per useful pair."""
    visited = 1
    for axis, query, key in zip(problem.axes, query_tile, key_tile, strict=True):
        visited *= tiles_along(axis, query, key)[1] * query * key
    return visited / math.prod(pairs(axis) for axis in problem.axes)
