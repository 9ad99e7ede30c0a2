"""Times of warm calls: medians over groups of back-to-back calls, on a GPU by events, elsewhere by the clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# What the host is thought to take to enqueue one call, until a group has shown it; PyTorch's sleep counts cycles.
HOST_SECONDS_PER_CALL = 100e-6
SLEEP_CYCLES_PER_SECOND = 2.0e9
ATTEMPTS = 4


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over groups, the 10th and 90th percentile, and how many calls were timed."""

    median: float
    low: float
    high: float
    calls: int


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _group_seconds(calls: Sequence[Call], first: int, count: int, device: torch.device) -> float:
    """Seconds per call of `count` calls, rotating through `calls` from index `first`."""
    rotating = [calls[(first + index) % len(calls)] for index in range(count)]
    if device.type == "cuda":
        return _seconds_by_events(rotating) / count
    started = time.perf_counter()
    for call in rotating:
        call()
    return (time.perf_counter() - started) / count


def _seconds_by_events(calls: Sequence[Call]) -> float:
    """The device sleeps until all calls are enqueued, so that it never waits for the host in between.

    Where the host took longer than that, the group is timed again behind a longer sleep.
    """
    asleep = len(calls) * HOST_SECONDS_PER_CALL
    for _ in range(ATTEMPTS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started = time.perf_counter()
        torch.cuda._sleep(int(asleep * SLEEP_CYCLES_PER_SECOND))
        begin.record()
        for call in calls:
            call()
        end.record()
        enqueuing = time.perf_counter() - started
        end.synchronize()
        if enqueuing < asleep:
            break
        asleep = 2 * enqueuing
    return begin.elapsed_time(end) / 1e3


def measure(
    methods: dict[str, Sequence[Call]], device: torch.device, seconds: float = 0.1, groups: int = 7
) -> dict[str, Timing]:
    """Times every method in turn, group by group, so that a drift of the clock hits all of them alike.

    Args:
        methods: for each name, the same call on several sets of inputs, which are rotated so that no cache keeps them.
        seconds: about how long one method is timed in all, warm-up not counted.
        groups: how many groups of calls the time is spread over; fewer, down to three, for a call that takes so long
            that it would need more than ten times `seconds`.
    """
    sizes, rounds = {}, {}
    for name, calls in methods.items():
        for call in calls:
            call()
        once = _group_seconds(calls, 0, 2, device)
        sizes[name] = max(1, min(50, math.ceil(seconds / groups / max(once, 1e-7))))
        rounds[name] = max(3, min(groups, math.ceil(10 * seconds / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in methods}
    for group in range(groups):
        for name, calls in methods.items():
            if group >= rounds[name]:
                continue
            samples[name].append(_group_seconds(calls, group, sizes[name], device))
    return {name: _timing(taken, len(taken) * sizes[name]) for name, taken in samples.items()}


def _timing(samples: Sequence[float], calls: int) -> Timing:
    return Timing(statistics.median(samples), _percentile(samples, 0.1), _percentile(samples, 0.9), calls)
