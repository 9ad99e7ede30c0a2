"""Compile what the GPU suite and scripts/sanitize.py will ask for, on a machine without a GPU.

    python tests/gpu/compile_ahead.py --cache FOLDER        then, there: FASTNA_CACHE_DIR=FOLDER make test-gpu

Both then start at once on a GPU machine with the same NVRTC; with another, they compile anew. An interrupted run goes
on where it was. Kernels that are missed here (those of whole models) are compiled when a test asks for them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(HERE)]

import sanitize  # noqa: E402
import test_fuzz  # noqa: E402
import test_golden  # noqa: E402
import test_many_maps  # noqa: E402
from random_problems import run  # noqa: E402

from kernels.cuda import jit  # noqa: E402
from kernels.cuda.dry import sources_of  # noqa: E402
from kernels.cuda.jit import KernelSource  # noqa: E402

CPU = torch.device("cpu")


def fuzz() -> None:
    for seed in range(test_fuzz.CONFIGURATIONS):
        for _, backend, call in test_fuzz.calls(seed, CPU):
            run(call, backend)
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def golden() -> None:
    for case in test_golden.CASES:
        for dtype in test_golden.TOLERANCES:
            for backend in test_golden.BACKENDS:
                test_golden.answers(case, dtype, backend, CPU)


def many_maps() -> None:
    for seed in range(test_many_maps.CALLS):
        run(test_many_maps.many_maps(seed, CPU), "fused")


def selection() -> None:
    for _ in sanitize.selection(CPU):
        pass


def compile_all(sources: list[KernelSource], architecture: str, deadline: float) -> int:
    """Compiles side by side until the deadline; returns how many are there."""

    def compiled(source: KernelSource) -> bool:
        if time.monotonic() > deadline:
            return False
        jit.compile_kernel(source, architecture)
        return True

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return sum(pool.map(compiled, sources))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the compiled kernels")
    parser.add_argument("--architecture", default="sm_90a", help="of the GPU that the suite will run on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no compilation starts")
    options = parser.parse_args()
    os.environ["FASTNA_CACHE_DIR"] = str(options.cache)
    deadline = time.monotonic() + options.seconds
    missing = 0
    for name, calls, line_numbers in (
        ("golden", golden, "0"),
        ("many maps", many_maps, "0"),
        ("fuzz", fuzz, "0"),
        ("sanitizer", selection, "1"),
    ):
        os.environ["FASTNA_LINEINFO"] = line_numbers
        sources = sources_of(calls)
        done = compile_all(sources, options.architecture, deadline)
        missing += len(sources) - done
        print(f"{name}: {done} of {len(sources)} kernels compiled", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
