"""Times cases with several methods, one JSON line each, and goes on where an interrupted sweep stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import floors
from benchmarks.cases import DTYPES, Case
from benchmarks.device import describe, device_name
from benchmarks.methods import BACKENDS, METHODS, Inputs, Prepared, Unsupported, make_inputs, sampled_error
from benchmarks.timing import Call, measure
from kernels.cuda.jit import KernelSource
from kernels.cuda.runtime import Runtime, installed_runtime, use_runtime

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
TF32_TOLERANCE = 1e-3
CACHE_BYTES = 2 * 60 * 2**20
ROOM = 0.85  # share of the device's memory that inputs and peers' work may take before a case counts as too large


def _sets_needed(case: Case, device: torch.device) -> int:
    """How many sets of inputs make a round trip larger than twice the cache."""
    problem = case.problem(device)
    return max(1, min(8, -(-CACHE_BYTES // int(floors.forward_bytes(problem) + 1)))) if device.type == "cuda" else 2


class _Listening:
    """A runtime that notes which kernels are asked for, and runs none."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.sources: list[KernelSource] = []

    def kernel(self, source: KernelSource, device: torch.device) -> _Listening:
        self.sources.append(source)
        return self

    def launch(self, *arguments: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


def compile_ahead(cases: Sequence[Case], names: Sequence[str], device: torch.device, gradient: bool) -> int:
    """Compiles the kernels that `cases` need side by side, and returns how many those are. Nothing is computed."""
    runtime = installed_runtime(device)
    if runtime is None:
        return 0
    listening = _Listening(runtime)
    with use_runtime(device.type, cast(Runtime, listening)):
        for case in cases:
            one = case.replace(batch=1)
            inputs = make_inputs(one, device, 0, gradient)
            for name in set(names) & set(BACKENDS):
                if _too_large(name, one, device) is None:
                    prepared = METHODS[name](one, inputs, gradient)
                    prepared.forward()
                    if prepared.backward:
                        prepared.backward()
    runtime.prepare(listening.sources, device)
    return len(set(listening.sources))


def _too_large(name: str, case: Case, device: torch.device) -> str | None:
    """Why `name` cannot hold the case in memory, told before it tries."""
    problem = case.problem(device)
    weights = problem.batch * problem.tokens * problem.heads * problem.window_size * DTYPES[case.dtype].itemsize
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 16 * 2**30
    if name in ("naive", "gemm") and 4 * weights > ROOM * total:
        return f"attention weights of {weights / 2**30:.1f} GiB do not fit"
    return None


def _prepare(name: str, case: Case, sets: Sequence[Inputs], gradient: bool) -> list[Prepared]:
    return [METHODS[name](case, inputs, gradient) for inputs in sets]


def run_case(
    case: Case, names: Sequence[str], device: torch.device, directions: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    """One record per method and direction: time, spread, rates, share of the floor, error, peak memory, or why not."""
    gradient = any(direction != "forward" for direction in directions)
    sets = [make_inputs(case, device, seed, gradient) for seed in range(_sets_needed(case, device))]
    problem = case.problem(device)
    records: dict[tuple[str, str], dict[str, Any]] = {}
    ready: dict[str, list[Prepared]] = {}
    for name in names:
        status, error, peak = _try(name, case, sets, device, gradient, ready)
        for direction in directions:
            record = {"name": case.name, "key": case.key, "case": asdict(case), "method": name, "direction": direction}
            records[name, direction] = record | {"status": status, "error": error, "peak_bytes": peak}
    ceilings = floors.CEILINGS.get(device_name(device))
    for direction in directions:
        calls = {name: _calls(prepared, direction) for name, prepared in ready.items()}
        for name, timing in (measure(calls, device, seconds) if calls else {}).items():
            record = records[name, direction]
            factor = {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction]
            record |= {"seconds": timing.median, "low": timing.low, "high": timing.high, "calls": timing.calls}
            record["tflops"] = factor * floors.forward_flops(problem) / timing.median / 1e12
            record["gbytes"] = (
                {"forward": 1, "backward": 2, "both": 3}[direction]
                * floors.forward_bytes(problem)
                / timing.median
                / 1e9
            )
            if ceilings:
                floor = floors.floor_seconds(problem, ceilings, direction)
                record |= {"floor_seconds": floor, "floor_share": floor / timing.median}
    return list(records.values())


def _calls(prepared: Iterable[Prepared], direction: str) -> list[Call]:
    if direction == "forward":
        return [item.forward for item in prepared]
    if direction == "backward":
        return [item.backward for item in prepared if item.backward]

    def both(item: Prepared) -> Call:
        def call() -> None:
            item.forward()
            assert item.backward is not None
            item.backward()

        return call

    return [both(item) for item in prepared]


def _try(
    name: str,
    case: Case,
    sets: Sequence[Inputs],
    device: torch.device,
    gradient: bool,
    ready: dict[str, list[Prepared]],
) -> tuple[str, float | None, int | None]:
    """Runs the method once and keeps its calls in `ready` if its answer is right. Returns status, error, peak bytes."""
    reason = _too_large(name, case, device)
    if reason:
        return f"unsupported: {reason}", None, None
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        prepared = _prepare(name, case, sets, gradient)
        output = prepared[0].forward()
        if prepared[0].backward:
            prepared[0].backward()
        peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        error = sampled_error(case, sets[0], output) if name in BACKENDS else None
    except Unsupported as reason_:
        return f"unsupported: {reason_}", None, None
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory", None, None
    except Exception as failure:  # a failing peer is a result, not the end of the sweep
        return f"failed: {type(failure).__name__}: {str(failure).splitlines()[0][:200]}", None, None
    tf32 = case.dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if error is not None and not error <= (TF32_TOLERANCE if tf32 else TOLERANCE[case.dtype]):
        return f"wrong: relative error {error:.2e}", error, peak
    ready[name] = prepared
    return "ok", error, peak


def done_already(path: Path) -> set[tuple[str, str, str]]:
    """(case key, method, direction) of every record in a results file; a last line cut short does not count."""
    found = set()
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "key" in record:
            found.add((record["key"], record["method"], record["direction"]))
    return found


def run(
    suite: str,
    cases: Sequence[Case],
    names: Sequence[str],
    device: torch.device,
    directions: Sequence[str],
    path: Path,
    seconds: float = 0.1,
    deadline: float | None = None,
) -> list[dict[str, Any]]:
    """Times `cases` into the JSON-lines file `path`, a header line of facts first; skips what the file holds already.

    Args:
        deadline: `time.monotonic()` after which no new case is begun.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = done_already(path)
    fresh: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    compile_ahead(cases, names, device, gradient=any(direction != "forward" for direction in directions))
    with path.open("a") as file, Progress(*columns, transient=True) as progress:
        file.write(json.dumps({"suite": suite, "environment": describe(device)}) + "\n")
        for case in progress.track(cases, description=suite):
            if deadline is not None and time.monotonic() > deadline:
                break
            todo = [
                name for name in names if any((case.key, name, direction) not in finished for direction in directions)
            ]
            if not todo:
                continue
            try:
                records = run_case(case, todo, device, directions, seconds)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                records = [
                    {
                        "name": case.name,
                        "key": case.key,
                        "case": asdict(case),
                        "method": name,
                        "direction": direction,
                        "status": "out of memory",
                    }
                    for name in todo
                    for direction in directions
                ]
            for record in records:
                file.write(json.dumps({"suite": suite} | record) + "\n")
            file.flush()
            fresh += records
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return fresh
