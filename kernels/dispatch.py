"""Which backend serves a problem, and why the others do not.

On CUDA `fused` serves whatever it can, on a CPU `native` all but the largest windows, and `tiled` serves the rest and
every other device. The others serve when named.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from kernels.backend import Backend
from kernels.problem import Problem

MODULES = {
    "fused": "kernels.cuda.fused",
    "gemm": "kernels.cuda.gemm",
    "naive": "kernels.cuda.naive",
    "native": "kernels.cpu.native",
    "tiled": "kernels.tiled",
    "reference": "kernels.reference",
}

# Forward and backward together, float32 (results/amd-epyc/kernels-ablation-window.jsonl): `native` takes 0.5 of the
# time of `tiled` at 13 x 13 keys, 0.8 at 21 x 21, 1.15 at 33 x 33, where products are large enough for a BLAS.
NATIVE_KEYS = 512


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Stands in for a backend whose module cannot be imported here."""

    name: str
    reason: str

    def why_not(self, problem: Problem) -> str | None:
        return self.reason


def require_known(name: str) -> None:
    """That there is a backend called `name`."""
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f"backend={name!r} is unknown; it must be one of {', '.join(MODULES)}, or None for the best")


@cache
def load(name: str) -> Backend:
    """The backend called `name`, imported on first use: a machine without CUDA never imports CuPy."""
    require_known(name)
    try:
        backend: Backend = import_module(MODULES[name]).BACKEND
    except ImportError as error:
        return Unavailable(name, f"It cannot be imported here: {error}.")
    return backend


def choose(problem: Problem, name: str | None) -> Backend:
    """The backend called `name`, or the first that serves where it is None. ValueError if that one does not serve."""
    if name is not None:
        backend = load(name)
        reason = backend.why_not(problem)
        if reason is not None:
            raise ValueError(
                f"backend={name!r} does not serve this call: {reason} Leave backend=None, or see kernels.explain(...)"
            )
        return backend
    if problem.device.type == "cuda":
        fused = load("fused")
        if fused.why_not(problem) is None:
            return fused
    if problem.device.type == "cpu" and problem.window_size <= NATIVE_KEYS:
        native = load("native")
        if native.why_not(problem) is None:
            return native
    return load("tiled")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend serves a call, and one sentence for each that does not; `str()` gives it as text.

    `deterministic`: its gradients are the same bits every time, as `set_deterministic` and PyTorch's switch are now.
    """

    problem: Problem
    backend: str
    reasons: dict[str, str | None]
    deterministic: bool

    def __str__(self) -> str:
        lines = [f"{self.backend} serves this call."]
        if not self.deterministic:
            lines.append("  The last bits of its gradients may differ from run to run: see kernels.set_deterministic.")
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  {name}: {reason or 'would serve it too, if named.'}")
        return "\n".join(lines)


def explain_problem(problem: Problem, name: str | None) -> Explanation:
    """Why `choose(problem, name)` chooses what it does."""
    chosen = choose(problem, name)
    reasons = {other: load(other).why_not(problem) for other in MODULES}
    repeats = getattr(chosen, "repeats", None)
    return Explanation(problem, chosen.name, reasons, repeats is None or repeats(problem))
