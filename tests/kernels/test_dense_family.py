"""Whole-map windows through PyTorch's attention: what is left to it, and the way there and back, on a CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kernels import backend, reference
from kernels.backend import Operands
from kernels.cuda import dense
from kernels.problem import Axis, Problem

WHOLE = Problem(
    2, (Axis(24, 24), Axis(25, 25)), 3, 3, 32, 32, 32**-0.5, torch.bfloat16, torch.device("cuda"), rpb_dtype=None
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"axes": (Axis(600, 600),)}, None),
        ({"axes": (Axis(24, 24, stride=5), Axis(25, 25))}, None),
        ({"axes": (Axis(24, 23), Axis(25, 25))}, "whole map"),
        ({"axes": (Axis(24, 12, dilation=2), Axis(25, 25))}, "whole map"),
        ({"axes": (Axis(24, 24, causal=True), Axis(25, 25))}, "whole map"),
        ({"axes": (Axis(20, 20), Axis(25, 25))}, "at least 512"),
        ({"rpb_dtype": torch.float32}, "bias"),
        ({"additional": 2}, "additional"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 36, "value_dim": 36}, "multiple of 8"),
        ({"head_dim": 136, "value_dim": 136}, "up to 128"),
        ({"value_dim": 64}, "one head_dim"),
        ({"key_heads": 1}, "key heads"),
        ({"scale": -1.0}, "positive scale"),
        ({"device": torch.device("cpu")}, "cpu"),
    ],
)
def test_what_is_served(changes, said):
    reason = dense.why_not(dataclasses.replace(WHOLE, **changes))
    assert reason is None if said is None else said in str(reason)


def _packed() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 24, 25, 3, 3, 32, generator=generator).bfloat16()
    return list(packed.unbind(3))


def test_which_tensors_are_served():
    query, key, value = _packed()
    assert dense.why_not_operands(WHOLE, Operands(query, key, value)) is None
    turned = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert "key" in str(dense.why_not_operands(WHOLE, Operands(query, turned, value)))
    odd = torch.zeros(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    assert "16 bytes" in str(dense.why_not_operands(WHOLE, Operands(query, key, odd)))


@pytest.mark.parametrize("extra", [(), (1,)], ids=["lse of FlashAttention", "lse of cuDNN"])
def test_output_and_lse(monkeypatch, extra):
    """PyTorch's CPU kernel in place of its CUDA ones: it has the same layouts and the same lse."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
        return output, lse.reshape(*lse.shape, *extra)

    monkeypatch.setattr(dense, "attend", attend)
    problem = dataclasses.replace(WHOLE, device=torch.device("cpu"), scale=0.3)
    operands = Operands(*_packed())
    output, lse = backend.forward(dense, problem, operands)
    exact = dataclasses.replace(problem, dtype=torch.float64)
    expected, expected_lse = reference.BACKEND.forward(exact, Operands(*(t.double() for t in _packed())))
    assert output.dtype is torch.bfloat16
    assert output.is_contiguous()
    assert lse.is_contiguous()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-2)
