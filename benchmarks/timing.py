"""Times of warm calls: medians over groups of back-to-back calls, on a GPU by events, elsewhere by the clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# More than the host takes to enqueue one call, so that the device never waits for the host inside a timed group.
HOST_SECONDS_PER_CALL = 300e-6
SLEEP_CYCLES_PER_SECOND = 1.7e9


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
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(count * HOST_SECONDS_PER_CALL * SLEEP_CYCLES_PER_SECOND))
        begin.record()
        for index in range(count):
            calls[(first + index) % len(calls)]()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count
    started = time.perf_counter()
    for index in range(count):
        calls[(first + index) % len(calls)]()
    return (time.perf_counter() - started) / count


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
