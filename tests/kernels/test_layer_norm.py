"""LayerNorm is PyTorch's: its numbers, its parameters, and its own function wherever someone looks on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.cuda import runtime
from kernels.cuda.dry import DryRuntime
from kernels.layer_norm import LayerNorm


@pytest.fixture
def dry():
    """A device of no numbers that serves CPU tensors: what is asked of it would have gone to the kernels."""
    served = DryRuntime()
    with runtime.use_runtime("cpu", served):
        yield served


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _pair(channels: int = 64, **options: bool) -> tuple[LayerNorm, nn.LayerNorm]:
    ours, theirs = LayerNorm(channels, **options), nn.LayerNorm(channels, **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_it_is_pytorchs_layer(options):
    ours, theirs = _pair(**options)
    assert isinstance(ours, nn.LayerNorm)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = _random(3, 5, 64).requires_grad_()
    assert torch.equal(ours(x), theirs(x))
    found, expected = (torch.autograd.grad(norm(x).square().sum(), x)[0] for norm in (ours, theirs))
    assert torch.equal(found, expected)
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))


def test_whatever_plain_tensors_go_to_the_kernels(dry):
    for rows, channels, options in ((7, 64, {}), (9, 2048, {"bias": False}), (3, 512, {"elementwise_affine": False})):
        norm = LayerNorm(channels, **options)
        dry.asked.clear()
        assert norm(_random(1, rows, channels).requires_grad_()).dtype is torch.float32
        assert [source.function for source in dry.asked] == ["layer_norm_forward"]
    dry.asked.clear()
    norm = LayerNorm(96).bfloat16()
    norm(_random(1, 7, 96).bfloat16()).sum().backward()
    assert [source.function for source in dry.asked] == ["layer_norm_forward", "layer_norm_backward", "layer_norm_sums"]
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype is torch.bfloat16


def test_parameters_that_are_not_its_own():
    """Computed, or swapped for a call."""
    ours, theirs = _pair()
    x, half = _random(3, 64), torch.full((64,), 0.5)
    with torch.no_grad():
        swapped = torch.func.functional_call(ours, {"weight": half}, (x,))
        torch.testing.assert_close(swapped, F.layer_norm(x, (64,), half, ours.bias))
        for layer in (ours, theirs):
            nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feeds_linear", [False, True])
def test_types_under_autocast(dry, dtype, feeds_linear):
    norm = LayerNorm(64, feeds_linear=feeds_linear)
    x = _random(3, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    assert output.dtype is (torch.bfloat16 if feeds_linear else torch.float32)
    output.sum().backward()
    assert dry.asked
    assert x.grad.dtype is dtype
    assert norm.weight.grad.dtype is torch.float32


class TestLeftToPyTorch:
    """Where the kernels would be wrong, unseen or of no use."""

    @pytest.fixture(autouse=True)
    def _never(self, dry):
        yield
        assert not dry.asked

    @pytest.mark.parametrize(
        "x",
        [
            torch.randn(3, 128)[:, ::2],
            torch.randn(64, 3).t(),
            torch.randn(193)[1:].view(3, 64),
            torch.randn(3, 64, dtype=torch.float64),
            torch.randn(0, 64),
        ],
        ids=["gaps", "columns", "misaligned", "float64", "empty"],
    )
    def test_tensors(self, x):
        norm = LayerNorm(64, dtype=x.dtype)
        assert torch.equal(norm(x), F.layer_norm(x, (64,), norm.weight, norm.bias))

    @pytest.mark.parametrize("shape", [(62,), (4100,), (2, 32)], ids=str)
    def test_widths(self, shape):
        x = _random(3, *shape)
        assert torch.equal(LayerNorm(shape)(x), F.layer_norm(x, shape, torch.ones(shape), torch.zeros(shape)))

    @pytest.mark.parametrize("x", [_random(3, 32), _random(3, 64).bfloat16()], ids=["width", "type"])
    def test_what_does_not_fit(self, x):
        norm = LayerNorm(64).double()
        with pytest.raises(RuntimeError) as expected:
            F.layer_norm(x, (64,), norm.weight, norm.bias)
        with pytest.raises(RuntimeError) as found:
            norm(x)
        assert str(found.value) == str(expected.value)

    def test_modes(self):
        with FlopCounterMode(display=False):
            LayerNorm(64)(_random(3, 64))
        with torch.device("cpu"):
            LayerNorm(64)(torch.ones(3, 64))

    def test_forward_mode(self):
        x, tangent = _random(3, 64), _random(4, 64)[:3]
        with forward_ad.dual_level():
            dual = LayerNorm(64)(forward_ad.make_dual(x, tangent))
            assert forward_ad.unpack_dual(dual).tangent is not None

    def test_transforms(self):
        norm, x = LayerNorm(64), _random(3, 5, 64)
        torch.testing.assert_close(torch.func.vmap(norm)(x), F.layer_norm(x, (64,), norm.weight, norm.bias))

    def test_compile(self):
        norm, x = LayerNorm(64), _random(3, 64)
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), F.layer_norm(x, (64,), norm.weight, norm.bias))

    def test_export(self):
        program = torch.export.export(nn.Sequential(LayerNorm(64)), (_random(3, 64),))
        assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
            torch.ops.aten.layer_norm.default
        ]

    def test_tracing_and_scripting(self):
        model, x = nn.Sequential(LayerNorm(64)), _random(3, 64)
        expected = F.layer_norm(x, (64,), model[0].weight, model[0].bias)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), expected)
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(torch.jit.script(traced)(x), expected)


def test_a_traced_graph_calls_the_kernels(dry):
    traced = torch.fx.symbolic_trace(nn.Sequential(LayerNorm(64)))
    traced(_random(3, 64))
    assert dry.asked
