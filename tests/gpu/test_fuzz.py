"""Two thousand random calls, forward and backward, over naive, gemm and fused, against float64.

Calls of one configuration share kernels, so that most of the time is not the compiler's. FASTNA_GPU_FUZZ is the number
of configurations, of 20 calls each; `random_calls(seed)` repeats one by hand.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from random_problems import Call, random_call, random_configuration, run, worst

CONFIGURATIONS = int(os.environ.get("FASTNA_GPU_FUZZ", "100"))
CALLS = 20
BACKENDS = ("fused", "gemm", "fused", "naive")


def calls(seed: int, device: torch.device) -> Iterator[tuple[str, str, Call]]:
    """`CALLS` random calls of the configuration that `seed` gives, with a backend for each; the first is its name."""
    rng = random.Random(seed)
    configuration = random_configuration(rng)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if configuration.tf32 else "ieee"
    for index in range(CALLS):
        backend = BACKENDS[index % len(BACKENDS)]
        call = random_call(rng, configuration, index // len(BACKENDS), device)
        yield f"seed {seed}, call {index}, {backend}", backend, call


def random_calls(seed: int) -> list[str]:
    """What is wrong with the calls that `seed` gives: a line each, or nothing."""
    failures = []
    for where, backend, call in calls(seed, torch.device("cuda")):
        try:
            ratio, name = worst(call, run(call, backend), run(call, "reference", exact=True))
        except Exception as error:
            failures.append(f"{where}: {type(error).__name__}: {error}; {call.description}")
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # the context is lost: what follows would say nothing
                return failures
            continue
        if not ratio <= 1:
            failures.append(f"{where}: {name} is {ratio:.2f} times too far from exact; {call.description}")
    return failures


def test_there_are_two_thousand_calls():
    assert "FASTNA_GPU_FUZZ" in os.environ or CONFIGURATIONS * CALLS >= 2000


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_random_calls_agree_with_float64(seed):
    failures = random_calls(seed)
    assert not failures, "\n".join(failures)
