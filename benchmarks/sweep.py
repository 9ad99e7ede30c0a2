"""Times cases with several methods, one JSON line each, and goes on where an interrupted sweep stopped."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import floors, summary
from benchmarks.cases import DTYPES, Case
from benchmarks.correctness import Inputs, sampled_error, tolerance
from benchmarks.device import describe, failure_status
from benchmarks.memory import peak_of
from benchmarks.methods import BACKENDS, CPU_FLOPS, METHODS, Prepared, Unsupported, make_inputs
from benchmarks.timing import Call, measure
from kernels.cuda.dry import DryRuntime
from kernels.cuda.runtime import installed_runtime, use_runtime

COMPILED_AHEAD = 32  # cases whose kernels are compiled side by side before the first of them is timed
CACHE_BYTES = 2 * 60 * 2**20
CPU_BYTES = 8 * 2**30
ROOM = 0.85  # share of the device's memory that inputs and peers' work may take before a case counts as too large


def _sets_needed(case: Case, device: torch.device) -> int:
    """How many sets of inputs make a round trip larger than twice the cache."""
    problem = case.problem(device)
    return max(1, min(8, -(-CACHE_BYTES // int(floors.forward_bytes(problem) + 1)))) if device.type == "cuda" else 2


def compile_ahead(cases: Sequence[Case], names: Sequence[str], device: torch.device, gradient: bool) -> int:
    """Compiles the kernels that `cases` need side by side, and returns how many those are. Nothing is computed."""
    runtime = installed_runtime(device)
    if runtime is None:
        return 0
    dry = DryRuntime(runtime.properties(device))
    with use_runtime(device.type, dry):
        for case in cases:  # in their own batch, on which the choice of a kernel may depend
            with contextlib.suppress(torch.OutOfMemoryError):
                inputs = make_inputs(case, device, 0, gradient)
                for name in set(names) & set(BACKENDS):
                    if _out_of_reach(name, case, device) is None:
                        prepared = METHODS[name](case, inputs, gradient)
                        prepared.forward()
                        if prepared.backward:
                            prepared.backward()
    runtime.prepare(dry.asked, device)
    return len(dry.asked)


def _out_of_reach(name: str, case: Case, device: torch.device) -> str | None:
    """Why `name` cannot hold the case in memory, or would take a CPU too long, told before it tries."""
    problem = case.problem(device)
    every = problem.batch * problem.heads * problem.tokens**2  # the reference scores every pair, masked or not
    # Its scores go through memory several times: a CPU takes some 30 times as long for as many products.
    work = 120 * every * case.head_dim if name == "reference" else floors.forward_flops(problem)
    if device.type != "cuda" and work > CPU_FLOPS:
        return "takes too long on a CPU"
    weights = problem.batch * problem.tokens * problem.heads * problem.window_size * DTYPES[case.dtype].itemsize
    held = {"naive": 4 * weights, "gemm": 4 * weights, "reference": 32 * every}.get(name, 0)
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else CPU_BYTES
    if held > ROOM * total:
        return f"attention weights of {held / 4 / 2**30:.1f} GiB do not fit"
    return None


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
        facts, prepared = _try(name, case, sets, device, gradient)
        if prepared:
            ready[name] = prepared
        for direction in directions:
            records[name, direction] = _identity(case, name, direction) | facts
    ceilings = floors.ceilings_of(device, [problem.dtype])
    for direction in directions:
        calls = {name: _calls(prepared, direction) for name, prepared in ready.items()}
        work, traffic = floors.factors(direction)
        for name, timing in (measure(calls, device, seconds) if calls else {}).items():
            record = records[name, direction]
            record |= {"seconds": timing.median, "low": timing.low, "high": timing.high, "calls": timing.calls}
            record["tflops"] = work * floors.forward_flops(problem) / timing.median / 1e12
            record["gbytes"] = traffic * floors.forward_bytes(problem) / timing.median / 1e9
            floor = floors.floor_seconds(problem, ceilings, direction)
            record |= {"floor_seconds": floor, "floor_share": floor / timing.median}
    return list(records.values())


def _run_apart(
    case: Case, names: Sequence[str], device: torch.device, directions: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    """`run_case`; where that fails, which one method's memory can do to all, each method by itself."""
    try:
        return run_case(case, names, device, directions, seconds)
    except Exception as failure:
        status = failure_status(failure)
    if len(names) == 1:
        return [_identity(case, names[0], direction) | {"status": status} for direction in directions]
    return [record for name in names for record in _run_apart(case, [name], device, directions, seconds)]


def _identity(case: Case, name: str, direction: str) -> dict[str, Any]:
    return {"name": case.name, "key": case.key, "case": asdict(case), "method": name, "direction": direction}


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
    name: str, case: Case, sets: Sequence[Inputs], device: torch.device, gradient: bool
) -> tuple[dict[str, Any], list[Prepared]]:
    """Runs the method once and judges its answer: the facts of a record, and its calls if the answer is right.

    The facts: status; relative error against float64 of sampled rows; peak bytes beyond what was there before; seconds
    until the first answer, compiling and masks included; which variant ran.
    """
    reason = _out_of_reach(name, case, device)
    if reason:
        return {"status": f"unsupported: {reason}"}, []
    cuda, before = device.type == "cuda", 0
    if cuda:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        started = time.perf_counter()
        prepared = [METHODS[name](case, sets[0], gradient)]
        answer = prepared[0].answer()
        if cuda:
            torch.cuda.synchronize(device)
        facts: dict[str, Any] = {"status": "ok", "setup_seconds": time.perf_counter() - started}
        peak = torch.cuda.max_memory_allocated(device) - before if cuda else peak_of(prepared[0].answer)
        facts["peak_bytes"] = peak
        facts["variant"] = prepared[0].variant
        facts["error"] = error = sampled_error(prepared[0].solves, sets[0], answer)
        del answer
        prepared += [METHODS[name](case, inputs, gradient) for inputs in sets[1:]]
    except Unsupported as reason_:
        return {"status": f"unsupported: {reason_}"}, []
    except Exception as failure:  # a failing peer is a result, not the end of the sweep
        return {"status": failure_status(failure)}, []
    if not error <= tolerance(case):
        return facts | {"status": f"wrong: relative error {error:.2e}"}, []
    return facts, prepared


def pending(
    cases: Sequence[Case], names: Sequence[str], directions: Sequence[str], path: Path
) -> dict[Case, list[str]]:
    """The cases that the results in `path` lack, and for each the methods that are to be timed."""
    there = {(r["key"], r["method"], r["direction"]) for r in summary.records(path) if "key" in r}
    wanted = {case: [n for n in names if any((case.key, n, d) not in there for d in directions)] for case in cases}
    return {case: methods for case, methods in wanted.items() if methods}


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

    Raises:
        RuntimeError: a kernel broke the device's context. What it did is recorded; running again goes on behind it.
    """
    wanted = pending(cases, names, directions, path)
    fresh: list[dict[str, Any]] = []
    gradient = any(direction != "forward" for direction in directions)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with summary.append(path) as file, Progress(*columns, transient=True) as progress:
        for index, case in enumerate(progress.track(list(wanted), description=suite)):
            if deadline is not None and time.monotonic() > deadline:
                break
            if index == 0:
                ceilings = floors.ceilings_of(device, {DTYPES[c.dtype] for c in wanted})
                environment = describe(device) | {"ceilings": floors.as_facts(ceilings)}
                file.write(json.dumps({"suite": suite, "environment": environment}) + "\n")
            if index % COMPILED_AHEAD == 0:
                compile_ahead(list(wanted)[index : index + COMPILED_AHEAD], names, device, gradient)
            records = _run_apart(case, wanted[case], device, directions, seconds)
            for record in records:
                file.write(json.dumps({"suite": suite} | record) + "\n")
            file.flush()
            fresh += records
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where a kernel has broken the context: nothing after it counts
                torch.cuda.empty_cache()
    return fresh
