"""Bias gradients of linear layers on CUDA: float64's numbers, the same bits every time, also in graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels import linear as module
from kernels.linear import Linear


def gradients_of(layer: nn.Linear, x: Tensor, gradient: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    return list(torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], gradient))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "channels"), [(1024, 8), (4099, 64), (401_408, 192), (100_352, 128), (6272, 2048), ((1 << 20) + 1, 32)]
)
def test_equals_float64(cuda, rows, channels, dtype):
    """Rows that do not cancel each other: a sum rounded to half precision on its way would be far off."""
    layer = Linear(16, channels, device=cuda, dtype=dtype)
    x = torch.randn(rows, 16, device=cuda).to(dtype)
    gradient = ((torch.randn(rows, channels, device=cuda) / 8 + 1) * (64 / rows)).to(dtype)
    assert type(layer(x)._base.grad_fn).__name__ == "_WithBiasGradientBackward", "by the product"
    exact = nn.Linear(16, channels, device=cuda, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    found, again = (gradients_of(layer, x, gradient) for _ in range(2))
    wanted = gradients_of(exact, x.double(), gradient.double())
    # The weight's gradient is PyTorch's own, which may round parts of long sums.
    for one, other, reference, tolerance in zip(found, again, wanted, (2**-8, 2**-6, 2**-8), strict=True):
        assert one.dtype is dtype
        assert torch.equal(one, other)
        assert float((one.double() - reference).norm() / reference.norm()) < tolerance


def test_autocast_keeps_what_was_summed_in_float32(cuda):
    layer, gradient = Linear(16, 64, device=cuda), torch.rand(20_000, 64, device=cuda).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(torch.randn(20_000, 16, device=cuda))
    output.backward(gradient)
    torch.testing.assert_close(layer.bias.grad.double(), gradient.double().sum(0), rtol=1e-6, atol=0)


@pytest.mark.alone
@pytest.mark.parametrize("is_warm", [True, False])
def test_graph(cuda, is_warm, monkeypatch):
    """Ones made while a graph is captured are its own; a row of them that was there before is read by it."""
    monkeypatch.setattr(module, "_kept_ones", {})
    layer = Linear(16, 64, device=cuda, dtype=torch.bfloat16)
    x, gradient = torch.randn(4096, 16, device=cuda).bfloat16(), torch.randn(4096, 64, device=cuda).bfloat16()
    side = torch.cuda.Stream(cuda)
    with torch.cuda.stream(side):
        expected = gradients_of(layer, x, gradient)
    side.synchronize()
    if not is_warm:
        module._kept_ones.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients_of(layer, x, gradient)
    assert bool(module._kept_ones) == is_warm
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
