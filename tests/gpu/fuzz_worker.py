"""One configuration of the fuzz, in a process of its own: kernels of many configurations compile side by side."""

from __future__ import annotations

import random

import torch
from random_problems import random_call, random_configuration, run, worst

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
