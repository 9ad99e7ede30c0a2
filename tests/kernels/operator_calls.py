"""Random calls for the operator's tests: hypothesis strategies, and a comparison of two backends over all results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import neighborhood_attention

LONGEST = {1: 60, 2: 17, 3: 7}


@dataclass(frozen=True)
class Call:
    """Everything random about a call; tensors follow from `seed`."""

    batch: int
    space: tuple[int, ...]
    key_heads: int
    shared: int
    head_dim: int
    value_dim: int
    has_rpb: bool
    additional: int
    scale: float | None
    seed: int
    windows: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

        heads = self.key_heads * self.shared
        tensors = {
            "query": normal(self.batch, *self.space, heads, self.head_dim),
            "key": normal(self.batch, *self.space, self.key_heads, self.head_dim),
            "value": normal(self.batch, *self.space, self.key_heads, self.value_dim),
        }
        if self.has_rpb:
            tensors["rpb"] = normal(heads, *(2 * window - 1 for window in self.windows["kernel_size"]))
        if self.additional:
            tensors["additional_keys"] = normal(self.batch, self.additional, self.key_heads, self.head_dim)
            tensors["additional_values"] = normal(self.batch, self.additional, self.key_heads, self.value_dim)
        return tensors


@st.composite
def axes(draw: st.DrawFn, rank: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    space, windows = [], {"kernel_size": [], "dilation": [], "stride": [], "is_causal": []}
    for _ in range(rank):
        length = draw(st.integers(1, LONGEST[rank]))
        window = draw(st.integers(1, length))
        space.append(length)
        windows["kernel_size"].append(window)
        windows["dilation"].append(draw(st.integers(1, length // window)))
        windows["stride"].append(draw(st.integers(1, window)))
        windows["is_causal"].append(draw(st.booleans()))
    return tuple(space), {name: tuple(values) for name, values in windows.items()}


@st.composite
def calls(draw: st.DrawFn) -> Call:
    space, windows = draw(axes(draw(st.integers(1, 3))))
    return Call(
        batch=draw(st.integers(1, 3)),
        space=space,
        key_heads=draw(st.integers(1, 2)),
        shared=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 8)),
        value_dim=draw(st.integers(1, 8)),
        has_rpb=draw(st.booleans()),
        additional=draw(st.sampled_from((0, 0, 3))),
        scale=draw(st.sampled_from((None, 0.0, 0.7, -0.3))),
        seed=draw(st.integers(0, 2**31)),
        windows=windows,
    )


def results(call: Call, tensors: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """Output, lse and all gradients, with a random gradient into both results."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    output, lse = neighborhood_attention(**leaves, **call.windows, scale=call.scale, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(call.seed + 1)
    # Of so few digits that every dtype holds them: rounded otherwise in each, calls would not be alike.
    seeds = [
        torch.randn(t.shape, dtype=torch.float32, generator=generator).bfloat16().to(t.dtype) for t in (output, lse)
    ]
    torch.autograd.backward((output, lse), seeds)
    return {"output": output.detach(), "lse": lse.detach()} | {f"grad {n}": t.grad for n, t in leaves.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """`||found - expected|| <= tolerance * ||expected||` for every result; a NaN never passes."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got, want = found[name].double(), want.double()
        error = (got - want).norm() / max(want.norm().item(), 1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.3g} above {tolerance:g}"
