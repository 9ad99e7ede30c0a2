"""Gradients of slices of one tensor are slices of one tensor, not copied into one; an operator's never share memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import na2d, packing
from kernels.cuda import fused
from kernels.packing import are_slices, unbind
from models.layers import NeighborhoodAttention


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every packed gradient that is put together."""
    counted: list[int] = []
    stack = torch.stack

    def counting(tensors: list[Tensor], dim: int = 0) -> Tensor:
        counted.append(dim)
        return stack(tensors, dim)

    monkeypatch.setattr(packing.torch, "stack", counting)
    return counted


def gradients(packed: Tensor, rpb: Tensor, grad: Tensor, dilation: int) -> tuple[Tensor, ...]:
    leaf, bias = packed.detach().requires_grad_(), rpb.detach().requires_grad_()
    output = na2d(*unbind(leaf), 7, dilation=dilation, rpb=bias, backend="fused")
    return torch.autograd.grad(output, (leaf, bias), grad)


@pytest.mark.parametrize(
    ("space", "dilation", "family"),
    [((16, 14), 1, "hopper_ring_backward"), ((28, 14), 2, "hopper_ring_backward"), ((14, 7), (2, 1), "block")],
)
def test_gradients_are_the_same_numbers_without_a_copy(emulator, copies, space, dilation, family, monkeypatch):
    served = []
    families = fused.backward_families

    def recording(*arguments):
        served.append(families(*arguments)[0].__name__.rpartition(".")[2])
        return families(*arguments)

    monkeypatch.setattr(fused, "backward_families", recording)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(4, *space, 3, 2, 32, generator=generator).bfloat16()
    rpb, grad = (
        torch.randn(2, 13, 13, generator=generator),
        torch.randn(4, *space, 2, 32, generator=generator).bfloat16(),
    )
    first, second, third = (gradients(packed, rpb, grad, dilation) for _ in range(3))
    assert set(served) == {family}
    assert len(copies) == 1  # the first call of its kind goes by the operator
    assert second[0].is_contiguous()
    for one, other, another in zip(first, second, third, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, another)


def test_a_layer_trains_without_a_copy(emulator, copies):
    layer = NeighborhoodAttention(64, 7, backend="fused").bfloat16()
    x = torch.randn(4, 16, 14, 64).bfloat16()
    for _ in range(3):
        layer.zero_grad()
        layer(x).float().square().sum().backward()
    assert len(copies) == 1
    exact = NeighborhoodAttention(64, 7, backend="reference").double()
    exact.load_state_dict(layer.state_dict())
    exact(x.double()).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        assert (ours.grad.double() - theirs.grad).norm() < 3e-2 * theirs.grad.norm()


def test_the_operator_returns_tensors_of_their_own(emulator):
    query, key, value = torch.randn(4, 16, 14, 3, 2, 32).bfloat16().unbind(-3)
    options = [7, 7], [1, 1], [1, 1], [False, False], 32**-0.5, "fused"
    output, lse = torch.ops.fastna.forward(query, key, value, None, None, None, *options)
    for _ in range(2):
        found = torch.ops.fastna.backward(
            query, key, value, None, None, None, output, lse, torch.ones_like(output), None, False, *options
        )
        assert all(gradient.is_contiguous() for gradient in found[:3])


def test_what_slices_are():
    packed = torch.randn(2, 5, 3, 2, 8)
    query, key, value = packed.unbind(-3)
    assert are_slices(query, key, value)
    assert not are_slices(query, value, key)
    assert not are_slices(query, key, key)
    assert not are_slices(query.clone(), key.clone(), value.clone())
    assert not are_slices(query[:, 1:], key[:, 1:], value[:, 1:])
    assert not are_slices(*torch.randn(2, 5, 4, 2, 8).unbind(-3)[:3])
    other = packed.clone().unbind(-3)
    assert not are_slices(query, key, other[2])


def test_gradients_of_any_slices(copies):
    """Of unlike use, second order, and where nobody wants any."""
    packed = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)

    def penalty(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query * key).sum() + value[..., :2].pow(3).sum()

    expected = torch.autograd.grad(penalty(*packed.unbind(-3)), packed)
    assert torch.equal(*torch.autograd.grad(penalty(*unbind(packed)), packed), *expected)
    assert torch.autograd.gradgradcheck(lambda packed: penalty(*unbind(packed)), packed)
    query, _, _ = unbind(packed)
    assert torch.equal(
        torch.autograd.grad(query.sum(), packed)[0].sum((0, 1, 3, 4)).bool(), torch.tensor([True, False, False])
    )
    assert not unbind(packed.detach())[0].requires_grad
