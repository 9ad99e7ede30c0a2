"""What runs in processes of its own, where kernels compile side by side. Each check returns what is wrong, a line each.

In one process the gradients' kernels would be compiled one after another, by PyTorch's one autograd thread per device.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from random_problems import TOLERANCES, random_call, random_configuration, run, worst
from torch import Tensor

from kernels import na2d, neighborhood_attention

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
Check = Callable[..., list[str]]
_substitute: ProcessPoolExecutor | None = None


def run_check(check: Check, *arguments: object) -> list[str]:
    """`check(*arguments)`, and what it raises as a failure.

    A kernel that reads or writes where it must not costs the process its CUDA context; checks that come later run in a
    process that takes its place.
    """
    global _substitute
    if _substitute is not None:
        return _substitute.submit(run_check, check, *arguments).result()
    try:
        failures = check(*arguments)
    except Exception as error:
        failures = [f"{type(error).__name__}: {error}"]
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError as error:
        failures.append(f"the CUDA context is lost: {error}")
        _substitute = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    return failures


CALLS = 20
BACKENDS = ("fused", "gemm", "fused", "naive")


def check_configuration(seed: int) -> list[str]:
    """What is wrong with `CALLS` random calls of the configuration that `seed` gives: a line each, or nothing."""
    rng = random.Random(seed)
    configuration = random_configuration(rng)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if configuration.tf32 else "ieee"
    failures = []
    for index in range(CALLS):
        backend = BACKENDS[index % len(BACKENDS)]
        call = random_call(rng, configuration, torch.device("cuda"))
        where = f"seed {seed}, call {index}, {backend}: "
        try:
            ratio, name = worst(call, run(call, backend), run(call, "reference", exact=True))
        except Exception as error:
            failures.append(f"{where}{type(error).__name__}: {error}; {call.description}")
            if isinstance(error, torch.AcceleratorError):  # the context is lost: what follows would say nothing
                return failures
            continue
        if not ratio <= 1:
            failures.append(f"{where}{name} is {ratio:.2f} times too far from exact; {call.description}")
    return failures


def check_golden(index: int, dtype: torch.dtype, backend: str) -> list[str]:
    """One of the published operators' vectors: inputs by seed, answers from tests/golden."""
    case = json.loads((GOLDEN / "na_vectors.json").read_text())[index]
    rng = np.random.RandomState(case["seed"])
    shape = (case["batch"], *case["shape"], case["heads"], case["dim"])

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to("cuda", dtype)

    query, key, value, grad_output = (normal(shape) for _ in range(4))
    operands = [query, key, value]
    if case["rpb"]:
        operands.append(normal((case["heads"], *(2 * k - 1 for k in case["k"]))))
    for operand in operands:
        operand.requires_grad_()
    output, lse = neighborhood_attention(
        *operands[:3],
        case["k"],
        dilation=case["d"],
        is_causal=case["causal"],
        rpb=operands[3] if case["rpb"] else None,
        scale=case["scale"],
        return_lse=True,
        backend=backend,
    )
    results = [output, lse, *torch.autograd.grad(output, operands, grad_output)]
    failures = []
    with np.load(GOLDEN / "na_vectors.npz") as vectors:
        for name, result in zip(("out", "lse", "dq", "dk", "dv", "drpb"), results, strict=False):
            expected = torch.from_numpy(vectors[f"{index}/{name}"]).double()
            error = (result.detach().cpu().double() - expected).norm() / expected.norm()
            # The inputs are rounded too: that alone moves the answer by up to the tolerance.
            if not error <= (1 if dtype == torch.float32 else 2) * TOLERANCES[dtype]:
                failures.append(f"{name}: {error:.2e}")
    return failures


def projection(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Query, key and value `shape`, as slices of one packed projection `[batch, *space, 3, heads, head_dim]`."""
    generator = torch.Generator(device).manual_seed(seed)
    packed = torch.randn(*shape[:-2], 3, *shape[-2:], device=device, generator=generator).to(dtype)
    return packed.unbind(-3)


def bias(device: torch.device, dtype: torch.dtype, heads: int, *window: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(heads, *(2 * k - 1 for k in window), device=device, generator=generator).to(dtype)


def check_determinism(
    backend: str, dtype: torch.dtype, space: tuple[int, ...], window: tuple[int, ...], dilation: int
) -> list[str]:
    """The same call twice, forward and backward, over memory that differs in between."""
    cuda = torch.device("cuda", 0)
    query, key, value = (t.requires_grad_() for t in projection(cuda, dtype, 3, *space, 2, 32))
    rpb = bias(cuda, dtype, 2, *window).requires_grad_()
    runs = []
    for _ in range(2):
        output, lse = na2d(query, key, value, window, dilation=dilation, rpb=rpb, return_lse=True, backend=backend)
        runs.append([output, lse, *torch.autograd.grad(output.square().sum(), (query, key, value, rpb))])
        torch.empty(1 << 24, device=cuda).fill_(float("nan"))
    failures = []
    names = ("output", "lse", "grad_query", "grad_key", "grad_value", "grad_rpb")
    for name, first, second in zip(names, *runs, strict=True):
        if not torch.equal(first, second):
            failures.append(f"{name} differs")
        if not first.isfinite().all():
            failures.append(f"{name} is not finite")
    return failures
