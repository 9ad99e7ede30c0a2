"""The LayerNorm kernels' sources, run on the CPU, against float64: the output, the statistics and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from emulator import EmulatorRuntime, guarded, guarded_allocations
from torch import Tensor
from torch.nn import functional as F

from kernels.cuda.layer_norm import (
    BACKWARD_ELEMENTS,
    FORWARD_ELEMENTS,
    THREADS,
    Norm,
    bind_backward,
    bind_forward,
    choose_tile,
    sums_launch,
    why_not,
)
from kernels.cuda.runtime import use_runtime
from kernels.layer_norm import LayerNorm

pytestmark = pytest.mark.usefixtures("emulator")

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
CPU = torch.device("cpu")
TOLERANCE = {FULL: 1e-6, HALF: 1e-3, BRAIN: 8e-3}


def tensors_of(norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the output's gradient, beside guard pages. The rows' means are not 0."""
    generator = torch.Generator().manual_seed(norm.channels)

    def normal(*shape: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        return guarded((torch.randn(shape, generator=generator) + mean).to(dtype))

    weights = [normal(norm.channels, dtype=norm.weight_dtype, mean=0.5) for _ in range(2)]
    x = normal(norm.rows, norm.channels, dtype=norm.dtype, mean=3.0)
    return x, weights[0], weights[1], normal(norm.rows, norm.channels, dtype=norm.output_dtype)


def exact(norm: Norm, *tensors: Tensor) -> list[Tensor]:
    """The output and the gradients of x, weight and bias in float64."""
    x, weight, bias, gradient = (tensor.double() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    output = F.layer_norm(x, (norm.channels,), weight, bias, norm.eps)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def run(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, gradient: Tensor) -> list[Tensor]:
    with guarded_allocations():
        output, statistics = bind_forward(norm, x.shape, True)(x, weight, bias)
        backward = bind_backward(norm, x.shape, weight is not None, bias is not None)
        gradients = backward(gradient, x, weight, statistics)
    assert statistics is not None
    mean, rstd = statistics
    variance, average = torch.var_mean(x.double(), -1, correction=0)
    torch.testing.assert_close(mean.double(), average, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (variance + norm.eps).rsqrt(), rtol=1e-6, atol=0)
    return [output, *(t for t in gradients if t is not None)]


def assert_right(norm: Norm) -> None:
    tensors = tensors_of(norm)
    dtypes = norm.output_dtype, norm.dtype, norm.weight_dtype, norm.weight_dtype
    for name, found, wanted, dtype in zip(
        ("output", "x", "weight", "bias"), run(norm, *tensors), exact(norm, *tensors), dtypes, strict=True
    ):
        assert found.dtype == dtype, name
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("channels", "rows", "types"),
    [
        (32, 300, (HALF, HALF, HALF)),
        (64, 333, (BRAIN, BRAIN, BRAIN)),
        (64, 257, (FULL, BRAIN, FULL)),
        (96, 41, (BRAIN, BRAIN, FULL)),
        (96, 70, (FULL, FULL, FULL)),
        (40, 77, (HALF, FULL, FULL)),
        (288, 9, (BRAIN, BRAIN, BRAIN)),
        (512, 37, (BRAIN, FULL, FULL)),
        (512, 1, (BRAIN, BRAIN, BRAIN)),
        (1024, 23, (BRAIN, BRAIN, BRAIN)),
        (1024, 5, (FULL, FULL, FULL)),
        (2048, 19, (BRAIN, BRAIN, BRAIN)),
        (2048, 7, (FULL, BRAIN, FULL)),
    ],
    ids=str,
)
def test_equals_float64(channels: int, rows: int, types: tuple[torch.dtype, ...]) -> None:
    assert_right(Norm(rows, channels, *types, 1e-5, CPU))


def test_many_steps_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cuda.layer_norm.BLOCKS", 1)
    assert_right(Norm(1000, 128, BRAIN, BRAIN, BRAIN, 1e-5, CPU))
    assert_right(Norm(43, 1024, BRAIN, BRAIN, BRAIN, 1e-5, CPU))


def test_without_weight_or_bias() -> None:
    norm = Norm(21, 64, FULL, FULL, FULL, 1e-3, CPU)
    x, weight, bias, gradient = tensors_of(norm)
    ones, zeros = torch.ones_like(weight), torch.zeros_like(bias)
    for given in ((None, None), (weight, None)):
        found = run(norm, x, *given, gradient)
        wanted = exact(norm, x, ones if given[0] is None else weight, zeros, gradient)
        for one, other in zip(found, wanted, strict=False):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
        assert len(found) == (2 if given[0] is None else 3)


def test_rows_far_from_zero_keep_their_variance() -> None:
    """Where the mean of squares less the square of the mean would have nothing left."""
    norm = Norm(8, 64, FULL, FULL, FULL, 1e-5, CPU)
    x, weight, bias, gradient = tensors_of(norm)
    x += 1e4
    assert (run(norm, x, weight, bias, gradient)[0] - exact(norm, x, weight, bias, gradient)[0]).abs().max() < 1e-2


def test_rows_of_one_number_become_the_bias() -> None:
    """Their mean is exact only by a division: times 1 / 104, it would be off to the same side in every row."""
    norm = Norm(70, 104, FULL, FULL, FULL, 1e-5, CPU)
    _, weight, bias, gradient = tensors_of(norm)
    x = guarded(torch.arange(1.0, 71.0)[:, None].expand(70, 104).clone())
    assert torch.equal(run(norm, x, weight, bias, gradient)[0], bias.expand(70, 104))


def test_the_same_bits_whatever_the_order(emulator: EmulatorRuntime) -> None:
    norm = Norm(500, 96, BRAIN, BRAIN, FULL, 1e-5, CPU)
    tensors = tensors_of(norm)
    first = run(norm, *tensors)
    emulator.seed += 1
    assert all(map(torch.equal, first, run(norm, *tensors)))


@pytest.mark.parametrize("seed", [0, 1])
def test_no_race_in_shared_memory(seed: int) -> None:
    with use_runtime("cpu", EmulatorRuntime(seed, watches_races=True, multiprocessors=1)):
        assert_right(Norm(40, 2048, BRAIN, BRAIN, BRAIN, 1e-5, CPU))
        assert_right(Norm(70, 64, BRAIN, BRAIN, BRAIN, 1e-5, CPU))


@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN], ids=str)
@pytest.mark.parametrize(("count", "channels"), [(1, 8), (70, 36)])
def test_parts_are_added_up(dtype: torch.dtype, count: int, channels: int) -> None:
    parts = guarded(torch.randn(count, 2, channels, generator=torch.Generator().manual_seed(0)))
    weight, bias = (guarded(torch.zeros(channels, dtype=dtype)) for _ in range(2))
    sums_launch(dtype, count, channels).bind(CPU)(parts.data_ptr(), weight.data_ptr(), bias.data_ptr())
    for found, wanted in zip((weight, bias), parts.double().sum(0), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=1e-5)


def test_every_width_has_a_tile() -> None:
    for unit in (4, 8):
        for channels in range(unit, 2049, unit):
            for elements in (FORWARD_ELEMENTS, BACKWARD_ELEMENTS[unit]):
                tile = choose_tile(channels, unit, elements, elements)
                assert THREADS % tile.lanes == 0
                assert channels <= tile.lanes * elements
                assert -(-channels // unit) > tile.lanes // 2, "a row that half as many lanes would hold"


def test_says_why_it_does_not_serve() -> None:
    assert why_not(Norm(10, 64, BRAIN, BRAIN, BRAIN, 1e-5, CPU)) is None
    for rows, channels, dtype, device, reason in (
        (10, 64, torch.float64, "cpu", "not in torch.float64"),
        (10, 36, BRAIN, "cpu", "not a multiple of 8"),
        (10, 4096, BRAIN, "cpu", "from 8 to 2048"),
        (0, 64, BRAIN, "cpu", "0 rows"),
        (10, 64, BRAIN, "meta", "on meta"),
    ):
        assert reason in (why_not(Norm(rows, channels, dtype, dtype, dtype, 1e-5, torch.device(device))) or "")


class TestModule:
    """`kernels.layer_norm.LayerNorm` with the kernels behind it."""

    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
    def test_gradients(self, emulator: EmulatorRuntime, options: dict[str, bool]) -> None:
        norm = LayerNorm(64, **options)
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        exact = torch.nn.LayerNorm(64, **options).double()
        exact.load_state_dict(norm.state_dict())
        x = torch.randn(3, 5, 7, 64, requires_grad=True)
        double = x.detach().double().requires_grad_()
        gradient = torch.randn(64).expand_as(x)
        norm(x).backward(gradient)
        exact(double).backward(gradient.double())
        assert emulator.launches == (2 if options.get("elementwise_affine") is False else 3)
        for one, other in zip((x, *norm.parameters()), (double, *exact.parameters()), strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(norm(x).double(), exact(double), rtol=1e-5, atol=1e-5)

    def test_gradients_that_nobody_wants(self, emulator: EmulatorRuntime) -> None:
        norm = LayerNorm(64)
        norm.weight.requires_grad_(False)
        norm(torch.randn(3, 64)).sum().backward()
        assert norm.weight.grad is None
        torch.testing.assert_close(norm.bias.grad, torch.full((64,), 3.0))
        norm.requires_grad_(False)
        emulator.launches = 0
        x = torch.randn(3, 64, requires_grad=True)
        norm(x).sum().backward()
        assert emulator.launches == 2, "no parts, no sum"

    @pytest.mark.parametrize("dtype", [FULL, BRAIN], ids=str)
    def test_feeding_a_linear_layer_rounds_once(self, dtype: torch.dtype) -> None:
        """Under autocast: what is given in its type is what float32 would have been rounded to; gradients too."""
        plain, feeding = LayerNorm(64), LayerNorm(64, feeds_linear=True)
        results = []
        for norm in (plain, feeding):
            x = torch.linspace(-3, 5, 9 * 64).view(9, 64).sin().to(dtype).requires_grad_()
            linear = torch.nn.Linear(64, 32)
            torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
            with torch.autocast("cpu", BRAIN):
                output = norm(x)
                linear(output).sum().backward()
            results.append((output.to(BRAIN), x.grad, norm.weight.grad, norm.bias.grad))
        assert results[0][0].equal(results[1][0])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    def test_second_derivative(self, emulator: EmulatorRuntime) -> None:
        norm = LayerNorm(32)
        torch.nn.init.normal_(norm.weight)
        exact = torch.nn.LayerNorm(32).double()
        exact.load_state_dict(norm.state_dict())
        x = torch.randn(6, 32)

        def penalty(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            """Through two layers that share their weights."""
            x = x.requires_grad_()
            (gradient,) = torch.autograd.grad(layer(layer(x).sin()).square().sum(), x, create_graph=True)
            assert emulator.launches in (0, 2), "forward only"
            return torch.autograd.grad(gradient.square().sum(), (x, layer.weight))

        expected = penalty(exact, x.double())
        emulator.launches = 0
        found = penalty(norm, x)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)

    def test_whatever_matters_makes_another_call(self, emulator: EmulatorRuntime) -> None:
        """Each in turn differs from the first in one thing, and each is asked for twice."""
        norm, x = LayerNorm(64), torch.randn(5, 64)
        feeding = LayerNorm(64, feeds_linear=True)
        feeding.load_state_dict(norm.state_dict())
        exact = F.layer_norm(x, (64,))
        for _ in range(2):
            with torch.no_grad():
                assert norm(x).grad_fn is None
            assert norm(x).grad_fn is not None
            frozen = copy.deepcopy(norm).requires_grad_(False)
            assert frozen(x).grad_fn is None
            assert frozen(x.clone().requires_grad_()).grad_fn is not None
            with torch.autocast("cpu", BRAIN):
                assert (norm(x).dtype, feeding(x).dtype) == (FULL, BRAIN)
                assert norm(x.to(BRAIN)).dtype is FULL
            with torch.autocast("cpu", HALF):
                assert feeding(x).dtype is HALF
            assert feeding(x).dtype is FULL
            shallow = LayerNorm(64, eps=10.0)(x)
            torch.testing.assert_close(shallow, F.layer_norm(x, (64,), eps=10.0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(norm(x), exact, rtol=1e-5, atol=1e-5)
            misaligned = torch.randn(5 * 64 + 1)[1:].view(5, 64)
            launches = emulator.launches
            norm(misaligned)
            assert emulator.launches == launches, "PyTorch's own"

    def test_another_runtime_is_not_given_calls_bound_for_the_last(self) -> None:
        x = torch.randn(3, 64)
        for seed in range(2):
            other = EmulatorRuntime(seed)
            with use_runtime("cpu", other):
                LayerNorm(64)(x)
            assert other.launches == 1
