"""The operator as PyTorch's own functions equals the definition, and is all that an exported program holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Arguments of `neighborhood_attention` in float64: any rank, window, dilation, stride, mask and head sharing."""
    rank = draw(st.integers(1, 3))
    axes = []
    for _ in range(rank):
        window, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        length = window * dilation + draw(st.integers(0, {1: 90, 2: 14, 3: 5}[rank]))
        axes.append((length, window, dilation, draw(st.integers(1, window)), draw(st.booleans())))
    space, window, dilation, stride, causal = zip(*axes, strict=True)
    key_heads, shared, dim, additional = (draw(st.integers(low, 3)) for low in (1, 1, 1, 0))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    extra = {}
    if additional:
        extra = {
            "additional_keys": random(2, additional, key_heads, dim),
            "additional_values": random(2, additional, key_heads, dim + 1),
        }
    if draw(st.booleans()):
        extra["rpb"] = random(key_heads * shared, *(2 * k - 1 for k in window))
    return {
        "query": random(2, *space, key_heads * shared, dim),
        "key": random(2, *space, key_heads, dim),
        "value": random(2, *space, key_heads, dim + 1),
        "kernel_size": window,
        "dilation": dilation,
        "stride": stride,
        "is_causal": causal,
        **extra,
    }


@given(call=calls())
@settings(max_examples=60, deadline=None)
def test_decomposed_equals_the_definition(call: dict) -> None:
    expected = kernels.neighborhood_attention(**call, return_lse=True, backend="reference")
    with kernels.decomposed():
        found = kernels.neighborhood_attention(**call, return_lse=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 1, 9, 8, 2, 32).to(dtype)
    with kernels.decomposed():
        output, lse = kernels.na2d(query, key, value, 3, return_lse=True)
    expected = kernels.na2d(query, key, value, 3, backend="reference")
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(output, expected)


def test_exported_program_holds_no_operator_of_ours_and_takes_any_batch() -> None:
    module = kernels.NeighborhoodAttention2d(32, num_heads=2, kernel_size=3, dilation=2).eval()
    example = torch.randn(2, 7, 9, 32)
    with kernels.decomposed():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "fastna" not in program.graph_module.code
    for batch in (1, 5):
        images = torch.randn(batch, 7, 9, 32)
        torch.testing.assert_close(program.module()(images), module(images))


def test_a_traced_batch_may_be_symbolic() -> None:
    module = kernels.NeighborhoodAttention2d(32, num_heads=2, kernel_size=3).eval()
    program = torch.export.export(module, (torch.randn(2, 7, 9, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "fastna" in program.graph_module.code
    assert math.isfinite(program.module()(torch.randn(3, 7, 9, 32)).sum().item())
