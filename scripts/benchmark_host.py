"""Microseconds of host time that one call of the operator costs, stage by stage.

    python scripts/benchmark_host.py                    # on the GPU, if there is one, else on the CPU
    python scripts/benchmark_host.py --device cpu       # without launches: what Python and PyTorch cost

A floor is what no operator of PyTorch's does without: the allocation of the results, the launch (on a CPU: a function
that does nothing). `own` is the rest, all of it this project's: finding out what a call comes to, and addresses. Calls
go by PyTorch's dispatcher only where something listens (kernels/direct.py): `dispatched` is such a call, and `dispatch`
the floor in it, one dispatch to a Python kernel with as many arguments. Each figure is the best of several groups of
calls, groups of all stages in turn. The sum over the parts of the bias gradient, in `backward`, is PyTorch's and runs
on a CPU too.
Writes JSON lines to results/<device>/host.jsonl, the environment first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.device import describe, results_folder
from kernels import backend, calls, na2d, operators
from kernels.cuda import bound, fused, runtime
from kernels.cuda.dry import DryRuntime
from kernels.validation import describe as describe_problem

CALLS = 200  # of a group: fewer than a GPU's queue of launches holds
FLOORS = ("allocation", "launch", "dispatch")
# Name, dtype, dilation and whether there is a bias, of a map of 14 x 14 tokens with 8 heads of 32 channels.
CASES = (
    ("strip 14^2 h8", torch.bfloat16, 1, True),
    ("block 14^2 h8 d2", torch.bfloat16, 2, True),
    ("scalar 14^2 h8 float32", torch.float32, 1, False),
)

_floor = torch.library.Library("fastna_host_floor", "DEF")
_floor.define(f"forward({operators._OPERANDS}, {operators._ARGUMENTS}) -> (Tensor, Tensor)")


def microseconds(calls_of: dict[str, Callable[[], object]], device: torch.device, groups: int) -> dict[str, float]:
    """Of one call of each, the best of several groups; all in turn, so that a change of clock meets all of them."""
    best = dict.fromkeys(calls_of, float("inf"))
    for group in range(groups + 1):
        for name, call in calls_of.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            taken = (time.perf_counter() - start) / CALLS * 1e6
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if group:  # the first warms up
                best[name] = min(best[name], taken)
    return best


def forward_stages(
    dtype: torch.dtype, dilation: int, has_rpb: bool, device: torch.device, groups: int
) -> dict[str, float]:
    """Microseconds of each stage of a forward pass without gradients, and of the whole."""
    query, key, value = torch.zeros(2, 14, 14, 3, 8, 32, dtype=dtype, device=device).unbind(-3)
    rpb = torch.zeros(8, 13, 13, device=device) if has_rpb else None
    tensors = (query, key, value, rpb, None, None)
    options = ((7, 7), (dilation, dilation), (1, 1), (False, False), 32**-0.5)
    inputs = (*tensors, *options, "fused")
    problem = describe_problem(*tensors, *options)
    with torch.no_grad():
        kept = operators.forward(*inputs)
        _kept[:] = [kept]
        computed = calls.find(calls.kind_of(*inputs))
        assert computed is not None
        new_output, new_lse = bound.new_results(problem)
        stages = {
            "whole": lambda: na2d(query, key, value, 7, dilation=dilation, rpb=rpb, backend="fused"),
            "bound": lambda: computed(*tensors),
            "allocation": lambda: (new_output(), new_lse()),
            "launch": launch_alone(problem, tensors),
            "dispatched": lambda: operators.forward(*inputs),
            "dispatch": lambda: torch.ops.fastna_host_floor.forward.default(*inputs),
        }
        times = microseconds(stages, device, groups)
    return {
        "lookup": times["whole"] - times["bound"],
        "addresses": times["bound"] - times["allocation"] - times["launch"],
        "allocation": times["allocation"],
        "launch": times["launch"],
        "whole": times["whole"],
        "beyond the launch": times["whole"] - times["launch"],
        "own": times["whole"] - times["allocation"] - times["launch"],
        "dispatched": times["dispatched"],
        "dispatch": times["dispatch"],
    }


_kept: list[tuple[torch.Tensor, torch.Tensor]] = []
_floor.impl("forward", lambda *inputs: _kept[0], "CompositeExplicitAutograd")


def launch_alone(problem: object, tensors: Sequence[torch.Tensor | None]) -> Callable[[], None]:
    """The call's own launch, caught on its way and repeated."""
    caught: list[tuple[object, ...]] = []
    original = runtime.kernel

    class Catching:
        def __init__(self, source: object, device: torch.device) -> None:
            self._kernel = original(source, device)

        def launch(self, *arguments: object) -> None:
            caught.append((self._kernel, *arguments))

    runtime.kernel = Catching
    try:
        backend.forward(fused.BACKEND, problem, operators.Operands(*tensors))
    finally:
        runtime.kernel = original
    kernel, *arguments = caught[0]
    return lambda: kernel.launch(*arguments)


def gradient_stages(
    dtype: torch.dtype, dilation: int, has_rpb: bool, device: torch.device, groups: int
) -> dict[str, float]:
    """Microseconds of a forward pass that records a graph, and of its backward pass."""
    packed = torch.zeros(2, 14, 14, 3, 8, 32, dtype=dtype, device=device)
    leaves = [part.detach().requires_grad_() for part in packed.unbind(-3)]
    rpb = torch.zeros(8, 13, 13, device=device, requires_grad=True) if has_rpb else None

    def forward() -> torch.Tensor:
        return na2d(*leaves, 7, dilation=dilation, rpb=rpb, backend="fused")

    output = forward()
    incoming = torch.zeros_like(output)
    wanted = leaves if rpb is None else [*leaves, rpb]
    return microseconds(
        {
            "forward, recorded": forward,
            "backward": lambda: torch.autograd.grad(output, wanted, incoming, retain_graph=True),
        },
        device,
        groups,
    )


@contextlib.contextmanager
def serving(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        yield
    else:
        with runtime.use_runtime(device.type, DryRuntime()):
            yield


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--groups", type=int, default=20, help=f"of {CALLS} calls, the best of which counts")
    parser.add_argument("--output", type=Path, help="JSON lines (default: host.jsonl in this device's results)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(1)
    records = []
    with serving(device):
        for name, *case in CASES:
            stages = forward_stages(*case, device, options.groups)
            stages |= gradient_stages(*case, device, options.groups)
            records.append({"suite": "host", "case": name, "microseconds": stages})

    table = Table("stage, us", title=f"Host time of a call on {describe(device)['device']}")
    for record in records:
        table.add_column(record["case"], justify="right")
    for stage in records[0]["microseconds"]:
        cells = [f"{record['microseconds'][stage]:.2f}" for record in records]
        table.add_row(f"{stage} (floor)" if stage in FLOORS else stage, *cells)
    Console().print(table)
    path = options.output or results_folder(device) / "host.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"suite": "host", "environment": describe(device)}, *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
