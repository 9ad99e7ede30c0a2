"""Random calls, the same for the same seed, and how far a backend's answer may lie from the exact one."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import neighborhood_attention

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TF32_TOLERANCE = 1e-3


MAPS = 3


@dataclass(frozen=True)
class Map:
    """What tiles are chosen by, and with them some kernels."""

    space: tuple[int, ...]
    additional: int


@dataclass(frozen=True)
class Configuration:
    """What kernels are compiled for. Batch, heads, scale and strides vary inside one, and cost no compilation."""

    dtype: torch.dtype
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]
    head_dim: int
    value_dim: int
    rpb: torch.dtype | None
    tf32: bool
    maps: tuple[Map, ...]


@dataclass
class Call:
    configuration: Configuration
    tensors: dict[str, Tensor]
    scale: float
    grad_output: Tensor
    grad_lse: Tensor | None
    description: str

    def arguments(self) -> dict[str, object]:
        c = self.configuration
        return {"dilation": c.dilation, "stride": c.stride, "is_causal": c.causal, "scale": self.scale}


def random_configuration(rng: random.Random) -> Configuration:
    rank = rng.choice((1, 2, 2, 2, 3))
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    largest = {1: 40, 2: 13, 3: 5}[rank]
    if rank == 2 and rng.random() < 0.4:  # what published models use
        window = (rng.choice((3, 5, 7, 7, 7, 9)),) * 2
    else:
        window = tuple(rng.randint(1, largest) for _ in range(rank))
    dilation = tuple(rng.choice((1, 1, 2, 3)) for _ in range(rank))
    plain = rng.random() < 0.5
    stride = tuple(1 if plain else rng.randint(1, k) for k in window)
    causal = tuple(not plain and rng.random() < 0.3 for _ in range(rank))
    step = 4 if dtype == torch.float32 else 8
    head_dim = rng.choice((32, 32, 64, 128)) if rng.random() < 0.6 else step * rng.randint(1, 128 // step)
    value_dim = head_dim if rng.random() < 0.8 else step * rng.randint(1, 128 // step)
    rpb = rng.choice((None, dtype, torch.float32))
    tf32 = dtype == torch.float32 and rng.random() < 0.3
    maps = tuple(random_map(rng, window, dilation) for _ in range(MAPS))
    return Configuration(dtype, window, dilation, stride, causal, head_dim, value_dim, rpb, tf32, maps)


def random_map(rng: random.Random, window: tuple[int, ...], dilation: tuple[int, ...]) -> Map:
    budget = {1: 200, 2: 30, 3: 12}[len(window)]
    # A third of the axes are dense (window * dilation = length), where a kernel may do without masks.
    space = tuple(
        k * d if rng.random() < 0.33 else rng.randint(k * d, max(k * d, budget))
        for k, d in zip(window, dilation, strict=True)
    )
    return Map(space, rng.choice((0, 0, 0, 1, 5, 17)))


def random_call(rng: random.Random, configuration: Configuration, which: int, device: torch.device) -> Call:
    """A call on map number `which` of the configuration."""
    c = configuration
    space, additional = c.maps[which % MAPS].space, c.maps[which % MAPS].additional
    batch = rng.randint(1, 3)
    key_heads = rng.randint(1, 3)
    heads = key_heads * rng.choice((1, 1, 1, 2, 3))
    generator = torch.Generator(device).manual_seed(rng.getrandbits(32))

    def normal(*shape: int, dtype: torch.dtype = c.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    packed = heads == key_heads and c.head_dim == c.value_dim and rng.random() < 0.5
    if packed:  # three slices of one projection
        query, key, value = normal(batch, *space, 3, heads, c.head_dim).unbind(-3)
    else:
        query = normal(batch, *space, heads, c.head_dim)
        key = normal(batch, *space, key_heads, c.head_dim)
        value = normal(batch, *space, key_heads, c.value_dim)
    tensors = {"query": query, "key": key, "value": value}
    if c.rpb is not None:
        tensors["rpb"] = normal(heads, *(2 * k - 1 for k in c.window), dtype=c.rpb)
    if additional:
        tensors["additional_keys"] = normal(batch, additional, key_heads, c.head_dim)
        tensors["additional_values"] = normal(batch, additional, key_heads, c.value_dim)
    grad_lse = normal(batch, *space, heads, dtype=torch.float32) if rng.random() < 0.3 else None
    scale = rng.choice((c.head_dim**-0.5, c.head_dim**-0.5, 0.3 * c.head_dim**-0.5, 0.0))
    description = (
        f"{c}, space {space}, batch {batch}, heads {heads}/{key_heads}, scale {scale:.3f}, "
        f"additional {additional}, packed {packed}, grad_lse {grad_lse is not None}"
    )
    return Call(c, tensors, scale, normal(batch, *space, heads, c.value_dim), grad_lse, description)


def run(call: Call, backend: str, *, exact: bool = False) -> dict[str, Tensor]:
    """Output, lse and all gradients by name; with `exact` from the same numbers in float64."""
    tensors = {}
    for name, tensor in call.tensors.items():
        tensors[name] = (tensor.double() if exact else tensor).detach().requires_grad_()
    operands = dict(tensors)
    query, key, value = (operands.pop(name) for name in ("query", "key", "value"))
    output, lse = neighborhood_attention(
        query, key, value, call.configuration.window, **operands, **call.arguments(), return_lse=True, backend=backend
    )
    outputs, incoming = [output], [call.grad_output.to(output.dtype)]
    if call.grad_lse is not None:
        outputs.append(lse)
        incoming.append(call.grad_lse.to(lse.dtype))
    gradients = torch.autograd.grad(outputs, list(tensors.values()), incoming)
    results = {"output": output.detach(), "lse": lse.detach()}
    return results | {f"grad_{name}": grad for name, grad in zip(tensors, gradients, strict=True)}


def worst(call: Call, results: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error as a multiple of what is allowed, and which tensor has it.

    The error is `|result - exact| / |exact|`; but what is zero or nearly so by cancellation (one key per window, scale
    0) is measured by the size of its terms.
    """
    c = call.configuration
    tolerance = TF32_TOLERANCE if c.tf32 else TOLERANCES[c.dtype]
    incoming = float(call.grad_output.double().norm())
    score = 0.1 * c.value_dim**0.5 * incoming  # of the gradients of the scores
    terms = {"grad_query": call.scale * c.head_dim**0.5 * score, "grad_rpb": score}
    terms |= {"grad_key": terms["grad_query"], "grad_additional_keys": terms["grad_query"]}
    terms["lse"] = exact["lse"].numel() ** 0.5
    ratios = {}
    for name, expected in exact.items():
        actual = results[name].double()
        size = max(float(expected.norm()), terms.get(name, 0.0), 1e-6)
        error = float((actual - expected).norm()) / size
        ratios[name] = error / tolerance if error == error else float("inf")
    name = max(ratios, key=ratios.__getitem__)
    return ratios[name], name
