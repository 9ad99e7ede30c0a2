"""Small windows over many maps, forward and backward against float64: what the models' layers call.

The fuzz has one to three maps, too few for the kernels whose blocks walk down many.
"""

from __future__ import annotations

import random

import pytest
import torch
from random_problems import Call, Configuration, Map, run, worst

LENGTHS = (8, 14, 16, 20, 24, 12, 13, 9, 7)
CALLS = 44
MAPS_AT_LEAST = 160  # more than an SM each


def many_maps(seed: int, device: torch.device) -> Call:
    rng = random.Random(seed)
    groups = rng.choice(LENGTHS), rng.choice(LENGTHS)
    windows = (3, 5, 7, 7) if seed % 2 else (3, 7, 9, 11, 11, 13)
    window = tuple(rng.choice([k for k in windows if k <= length]) for length in groups)
    dilation = (rng.choice((1, 2, 3)), rng.choice((1, 2, 8))) if seed % 4 == 0 else (1, 1)
    space = groups[0] * dilation[0], groups[1] * dilation[1]
    dtype, head_dim = rng.choice((torch.float16, torch.bfloat16)), rng.choice((32, 32, 64))
    rpb = rng.choice((None, dtype, torch.float32))
    configuration = Configuration(
        dtype, window, dilation, (1, 1), (False, False), head_dim, head_dim, rpb, False, (Map(space, 0),)
    )
    heads = rng.randint(1, 4)
    batch = -(-MAPS_AT_LEAST // (heads * dilation[0] * dilation[1])) + rng.randint(0, 40 // dilation[1])
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    query, key, value = normal(batch, *space, 3, heads, head_dim).unbind(-3)
    tensors = {"query": query, "key": key, "value": value}
    if rpb is not None:
        tensors["rpb"] = normal(heads, *(2 * k - 1 for k in window), dtype=rpb)
    grad_lse = normal(batch, *space, heads, dtype=torch.float32) if rng.random() < 0.3 else None
    description = f"{configuration}, batch {batch}, heads {heads}, grad_lse {grad_lse is not None}"
    return Call(configuration, tensors, head_dim**-0.5, normal(batch, *space, heads, head_dim), grad_lse, description)


@pytest.mark.parametrize("seed", range(CALLS))
def test_small_windows_over_many_maps_agree_with_float64(cuda, seed):
    call = many_maps(seed, cuda)
    results = run(call, "fused")
    ratio, name = worst(call, results, run(call, "reference", exact=True))
    assert ratio <= 1, f"{name} is {ratio:.2f} times too far from exact; {call.description}"
    for name, again in run(call, "fused").items():
        assert torch.equal(again, results[name]), f"{name} differs from call to call; {call.description}"
