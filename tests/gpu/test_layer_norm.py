"""LayerNorm on CUDA: float64's numbers, PyTorch's types and roundings, the same bits every time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kernels.layer_norm import LayerNorm

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = tuple(TOLERANCE)


def layer_on(device: torch.device, channels: int, dtype: torch.dtype = torch.float32, **options: bool) -> LayerNorm:
    norm = LayerNorm(channels, device=device, dtype=dtype, **options)
    for seed, parameter in enumerate(norm.parameters()):
        generator = torch.Generator(device).manual_seed(seed)
        parameter.data.copy_(1 - seed + torch.randn(channels, device=device, generator=generator))
    return norm


def rows_on(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed)) + 2


def gradients_of(norm: nn.LayerNorm, x: Tensor, gradient: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    output = norm(leaf)
    return [output.detach(), *torch.autograd.grad(output, [leaf, *norm.parameters()], gradient)]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [32, 40, 64, 96, 128, 256, 288, 384, 512, 768, 1024, 1536, 2048])
@pytest.mark.parametrize("rows", [1, 333, 20_001])
def test_equals_float64(cuda, rows, channels, dtype):
    norm = layer_on(cuda, channels, dtype)
    x, gradient = (rows_on(cuda, rows, channels, seed=seed).to(dtype) for seed in range(2))
    assert type(norm(x).grad_fn).__name__ == "_LayerNormBackward", "by the kernels"
    exact = nn.LayerNorm(channels, device=cuda, dtype=torch.float64)
    exact.load_state_dict(norm.state_dict())
    names = ("output", "x", "weight", "bias")
    for name, found, wanted in zip(
        names, gradients_of(norm, x, gradient), gradients_of(exact, x.double(), gradient.double()), strict=True
    ):
        assert found.dtype == dtype, name
        assert relative(found, wanted) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 96, 512, 2048])
def test_autocast_rounds_as_pytorch_does(cuda, channels, dtype, cast):
    """Float32 as PyTorch's own, and what feeds a linear layer as that layer would have rounded it."""
    plain = layer_on(cuda, channels)
    feeding = layer_on(cuda, channels, feeds_linear=True)
    theirs = nn.LayerNorm(channels, device=cuda)
    theirs.load_state_dict(plain.state_dict())
    x, gradient = rows_on(cuda, 1001, channels).to(dtype), rows_on(cuda, 1001, channels, seed=1).to(cast)
    with torch.autocast("cuda", cast):
        found = [gradients_of(norm, x, gradient.to(norm(x).dtype)) for norm in (plain, feeding, theirs)]
    assert [results[0].dtype for results in found] == [torch.float32, cast, torch.float32]
    wanted = found[2]
    for results in found[:2]:
        assert [t.dtype for t in results[1:]] == [t.dtype for t in wanted[1:]]
    torch.testing.assert_close(found[0][0], wanted[0], rtol=1e-5, atol=1e-5)
    rounded = wanted[0].to(cast)
    assert float((found[1][0] != rounded).float().mean()) < 2e-3, "a last bit, where float32 lies between two"
    for ours in found[:2]:
        for one, other in zip(ours[1:], wanted[1:], strict=True):
            assert relative(one, other.double()) < (1e-5 if one.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("channels", [64, 96, 512, 1024])
def test_the_same_bits_every_time(cuda, channels):
    """Over memory that differs in between."""
    norm = layer_on(cuda, channels, torch.bfloat16)
    x, gradient = (rows_on(cuda, 30_001, channels, seed=seed).bfloat16() for seed in range(2))
    first = gradients_of(norm, x, gradient)
    torch.empty(1 << 26, device=cuda).fill_(float("nan"))
    assert all(map(torch.equal, first, gradients_of(norm, x, gradient)))


def test_without_weight_or_bias(cuda):
    x, gradient = (rows_on(cuda, 100, 64, seed=seed) for seed in range(2))
    for options in ({"bias": False}, {"elementwise_affine": False}):
        norm = layer_on(cuda, 64, **options)
        exact = copy.deepcopy(norm).double()
        for found, wanted in zip(
            gradients_of(norm, x, gradient), gradients_of(exact, x.double(), gradient.double()), strict=True
        ):
            assert relative(found, wanted) < 2e-6


def test_second_derivative(cuda):
    norm, x = layer_on(cuda, 64), rows_on(cuda, 50, 64)
    found, expected = [], []
    for layer, leaf, results in ((norm, x, found), (copy.deepcopy(norm).double(), x.double(), expected)):
        leaf = leaf.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf, create_graph=True)
        results += torch.autograd.grad(gradient.square().sum(), (leaf, layer.weight))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-4


def test_a_cuda_graph_replays_it(cuda):
    norm, x = layer_on(cuda, 128, torch.bfloat16), rows_on(cuda, 500, 128).bfloat16().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        output = norm(x)
        return output, *torch.autograd.grad(output.square().sum(), (x, *norm.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(rows_on(cuda, 500, 128, seed=5))
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.alone
def test_more_than_two_to_the_31_elements(cuda):
    rows, channels = (1 << 25) + 5, 64
    if torch.cuda.mem_get_info(cuda)[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    norm = layer_on(cuda, channels, torch.bfloat16)
    x = torch.zeros(rows, channels, dtype=torch.bfloat16, device=cuda)
    x[-100:] = rows_on(cuda, 100, channels).bfloat16()
    x.requires_grad_()
    output = norm(x)
    gradient = torch.zeros_like(output)
    gradient[-100:] = rows_on(cuda, 100, channels, seed=1).bfloat16()
    found = [output.detach(), *torch.autograd.grad(output, (x, *norm.parameters()), gradient)]
    alone = gradients_of(norm, x.detach()[-100:], gradient[-100:])
    for one, other in zip(found, alone, strict=True):
        assert relative(one[-100:], other.double()) < 8e-3


def test_a_models_gradients_equal_those_with_pytorchs_layers(cuda):
    timm = pytest.importorskip("timm")
    import models  # noqa: F401  (registers the zoo)

    torch.manual_seed(0)
    ours = timm.create_model("dinat_s_tiny", depths=(1, 1, 2, 1), num_classes=10, drop_path_rate=0.0).to(cuda).train()
    theirs = copy.deepcopy(ours)
    for layer in theirs.modules():
        if isinstance(layer, LayerNorm):
            layer.__class__ = nn.LayerNorm
    images = torch.randn(2, 3, 224, 224, device=cuda)
    for is_cast, tolerance in ((False, 1e-4), (True, 2e-2)):
        results = []
        for model in (ours, theirs):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=is_cast):
                loss = nn.functional.cross_entropy(model(images), torch.arange(2, device=cuda))
            loss.backward()
            results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert relative(results[0], results[1].double()) < tolerance
