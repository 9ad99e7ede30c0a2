"""Run compute-sanitizer's four tools over a short selection of calls. Needs a GPU and the CUDA toolkit.

python3 scripts/sanitize.py                        memcheck, racecheck, initcheck, synccheck
python3 scripts/sanitize.py --tool racecheck       one of them
python3 scripts/sanitize.py --selection            the calls alone, under no tool
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import neighborhood_attention
from kernels.cuda import runtime
from kernels.cuda.dry import sources_of
from kernels.cuda.jit import ENTRY_PREFIX, KernelSource
from kernels.layer_norm import LayerNorm

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("naive", "gemm", "fused")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Space, window, dilation, stride, causal: sliding, dense groups, ragged and even, strided, causal, three axes.
CALLS = (
    ((14, 15), (7, 7), (1, 1), 1, False),
    ((14, 14), (7, 7), (2, 2), 1, False),
    ((11, 18), (4, 5), (2, 1), 2, False),
    ((70,), (33,), (2,), 1, True),
    ((5, 6, 7), (3, 2, 5), (1, 1, 1), 1, False),
)
Call = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool]
MANY = 80  # maps, of two heads each
WALKED = ((32, 7, 1), (64, 7, 1), (32, 7, 2), (32, 11, 1), (32, 11, 2))  # by blocks that walk down many maps
FINDINGS = 99  # exit code of a tool that found something


def selection(device: torch.device) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Calls of every backend and type, forward and backward, with bias and additional keys, and LayerNorms: name and
    results."""
    for backend, dtype, call, extra in itertools.product(BACKENDS, DTYPES, CALLS, (0, 3)):
        yield f"{backend}, {dtype}, space {call[0]}", attend(device, backend, dtype, call, 2, 32, extra)
    for dtype, (head_dim, window, dilation) in itertools.product(DTYPES[1:], WALKED):
        call = ((16, 24), (window, window), (1, dilation), 1, False)
        what = f"many maps, {dtype}, window {window}, dilation {dilation}, head_dim {head_dim}"
        yield what, attend(device, "fused", dtype, call, MANY, head_dim, 0)
    for dtype, channels in itertools.product(DTYPES, (64, 96, 1024)):
        norm = LayerNorm(channels, device=device, dtype=dtype)
        x = torch.randn(333, channels, device=device).to(dtype).requires_grad_()
        normalised = norm(x)
        normalised.float().square().sum().backward()
        gradients = [t.grad for t in (x, *norm.parameters()) if t.grad is not None]
        yield f"layer norm, {dtype}, {channels} channels", [normalised, *gradients]


def attend(
    device: torch.device, backend: str, dtype: torch.dtype, call: Call, batch: int, head_dim: int, extra: int
) -> list[torch.Tensor]:
    """Output, lse and all gradients of one call of two heads."""
    space, window, dilation, stride, causal = call
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_()

    qkv = [normal(batch, *space, 2, head_dim) for _ in range(3)]
    rpb = normal(2, *(2 * k - 1 for k in window))
    more = [normal(batch, extra, 2, head_dim) for _ in range(2)] if extra else [None, None]
    output, lse = neighborhood_attention(
        *qkv,
        window,
        dilation=dilation,
        stride=stride,
        is_causal=causal,
        rpb=rpb,
        additional_keys=more[0],
        additional_values=more[1],
        return_lse=True,
        backend=backend,
    )
    ((output.float().square().sum() + lse.sum()) / batch).backward()  # float16 holds the sums over all maps
    return [output, lse, *(t.grad for t in (*qkv, rpb, *more) if t is not None and t.grad is not None)]


def kernels_of_selection(device: torch.device) -> list[KernelSource]:
    """What the selection takes on `device`, found without running it."""
    return sources_of(lambda: deque(selection(torch.device("cpu")), maxlen=0), runtime.properties(device))


def run_selection() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    runtime.prepare(kernels_of_selection(device), device)  # side by side; from the cache under the tools
    for name, results in selection(device):
        if not all(bool(t.isfinite().all()) for t in results):
            raise SystemExit(f"{name}: a result is not finite")
    torch.cuda.synchronize()


def sanitize(tool: str) -> tuple[int, str]:
    """Exit code of one tool over the selection, 0 where it finds nothing, and what it printed."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FINDINGS), "--print-limit", "20"]
    if tool != "initcheck":  # which has to see PyTorch's kernels write what ours read
        command += ["--kernel-name", f"kns={ENTRY_PREFIX}"]
    command += [sys.executable, __file__, "--selection"]
    # Without PyTorch's cache every tensor is an allocation of its own, so that a read past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTNA_LINEINFO": "1"}
    done = subprocess.run(
        command, env=environment, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be given again; all four by default")
    parser.add_argument("--selection", action="store_true", help="run the calls, under no tool")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("scripts/sanitize.py needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    if options.selection:
        run_selection()
        return 0
    if shutil.which("compute-sanitizer") is None:
        print(
            "compute-sanitizer is not on PATH: it comes with the CUDA toolkit (bin/compute-sanitizer)", file=sys.stderr
        )
        return 2
    print("compiling the kernels first, under no tool", flush=True)
    subprocess.run([sys.executable, __file__, "--selection"], env=os.environ | {"FASTNA_LINEINFO": "1"}, check=True)
    worst = 0
    with ThreadPoolExecutor() as pool:  # side by side: a tool leaves the GPU idle most of the time
        running = {pool.submit(sanitize, tool): tool for tool in options.tool or TOOLS}
        for done in as_completed(running):
            code, printed = done.result()
            verdict = "clean" if code == 0 else "found something" if code == FINDINGS else f"failed with {code}"
            print(f"===== {running[done]}\n{printed}\n{running[done]}: {verdict}", flush=True)
            worst = max(worst, code)
    return worst


if __name__ == "__main__":
    sys.exit(main())
