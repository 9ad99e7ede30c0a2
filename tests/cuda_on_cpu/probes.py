"""Launches of probes.cuh, on whatever runtime serves the tensors' device."""

from __future__ import annotations

from pathlib import Path

import torch

from kernels.cuda import jit, runtime
from kernels.cuda.arguments import AXIS, INT, POINTER, Struct, pack_axis
from kernels.cuda.jit import KernelSource
from kernels.problem import Axis

HERE = Path(__file__).resolve().parent
PROBE = Struct("ProbeArguments", "probes.cuh", a=POINTER, b=POINTER, out=POINTER, count=INT)
WINDOW_PROBE = Struct("WindowProbeArguments", "probes.cuh", axis=AXIS, out=POINTER)


def probe_source(function: str, config: str = "", threads: int = 32, arguments: str = "ProbeArguments") -> KernelSource:
    return KernelSource("probes.cuh", function, config, arguments, threads)


def run_probe(
    function: str,
    out: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    config: str = "",
    count: int = 0,
    threads: int = 32,
    grid: int = 1,
    shared: int = 0,
) -> torch.Tensor:
    """Runs one probe and returns `out`, which it wrote."""
    pointers = {name: tensor.data_ptr() for name, tensor in (("a", a), ("b", b), ("out", out)) if tensor is not None}
    arguments = PROBE.pack(count=count, **pointers)
    runtime.kernel(probe_source(function, config, threads), out.device).launch(grid, shared, arguments)
    return out


def run_window_probe(axis: Axis, device: torch.device) -> torch.Tensor:
    """Per token: begin and end of its window and of the queries that see it (positions), and the token again."""
    out = torch.empty(axis.length, 5, dtype=torch.int32, device=device)
    source = probe_source("window_probe", arguments="WindowProbeArguments")
    runtime.kernel(source, device).launch(1, 0, WINDOW_PROBE.pack(axis=pack_axis(axis), out=out.data_ptr()))
    return out


def include_probes(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Lets NVRTC find probes.cuh; the emulator does anyway."""
    monkeypatch.setattr(jit, "INCLUDE_ROOTS", (*jit.INCLUDE_ROOTS, HERE))
