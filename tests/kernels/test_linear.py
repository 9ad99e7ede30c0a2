"""Linear layers by oneDNN, or with bias gradients by products: PyTorch's numbers, and otherwise PyTorch's function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import linear as front
from kernels.cpu import linear as module
from kernels.linear import Linear, linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _by_onednn(monkeypatch):
    """Whatever processor and size."""
    monkeypatch.setattr(module, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(module, "WORTH", 1)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the products that oneDNN is asked for."""
    shapes = []
    compute = module._product

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return compute(x, weight, bias)

    monkeypatch.setattr(module, "_product", counted)
    return shapes


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(deadline=None)  # the first call prepares oneDNN
@given(
    lead=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
    has_bias=st.booleans(),
    is_strided=st.booleans(),
    is_expanded=st.booleans(),
)
def test_values_and_gradients(lead, inner, outer, has_bias, is_strided, is_expanded):
    x = _random(*lead, 2 * inner)[..., ::2] if is_strided else _random(*lead, inner)
    given = [x, _random(outer, inner), _random(outer) if has_bias else None]
    ours, exact = (
        [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in given]
        for dtype in (torch.float32, torch.float64)
    )
    grad = _random(outer).expand(*lead, outer) if is_expanded else _random(*lead, outer)
    found, expected = linear(*ours), F.linear(*exact)
    found.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, exact, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


def test_which_products_are_made(products):
    layer = Linear(8, 24)
    with torch.inference_mode():
        layer(_random(3, 5, 8))
    assert products == [((3, 5, 8), (24, 8))]
    products.clear()
    layer(_random(3, 5, 8).requires_grad_()).sum().backward()
    assert products == [((3, 5, 8), (24, 8)), ((3, 5, 24), (8, 24)), ((8, 15), (24, 15))]
    products.clear()
    layer.weight.requires_grad_(False)
    layer(_random(3, 5, 8)).sum().backward()
    assert products == [((3, 5, 8), (24, 8))]  # neither the input's nor the weight's gradient is asked for


@pytest.mark.parametrize(
    ("matrix", "is_copied"),
    [
        (torch.zeros(6, 4), False),
        (torch.zeros(6, 4).t(), False),
        (torch.zeros(2, 6, 4), False),
        (torch.zeros(6, 8)[:, :4], True),
        (torch.zeros(6, 8)[:, :4].t(), True),
        (torch.zeros(6, 1).expand(6, 4), True),
        (torch.zeros(4).expand(6, 4), True),
        (torch.zeros(2, 6, 4).transpose(0, 1), True),
    ],
)
def test_what_onednn_multiplies_slowly_is_copied(matrix, is_copied):
    dense = module._dense(matrix)
    assert dense.is_contiguous() or dense.t().is_contiguous()
    assert (dense.data_ptr() != matrix.data_ptr()) == is_copied


@pytest.mark.parametrize("bias", [torch.ones(1).expand(16), torch.arange(32.0)[::2]])
def test_biases_with_gaps(products, bias):
    x, weight = _random(4, 8), _random(16, 8)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(products) == 1


def test_second_derivative(products):
    x, weight = _random(6, 8).requires_grad_(), _random(5, 8).requires_grad_()

    def penalty(product):
        (grad,) = torch.autograd.grad((product(x, weight) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), (x, weight))

    for found, expected in zip(penalty(linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    assert len(products) > 3


@pytest.mark.filterwarnings("ignore")
def test_layers_become_pytorchs_for_tools_that_ask_for_the_type():
    model = nn.Sequential(Linear(8, 16), nn.GELU(), Linear(16, 8)).eval()
    x = _random(4, 8)
    expected = model(x)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = nn.Linear
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert [isinstance(quantized[i], torch.ao.nn.quantized.dynamic.Linear) for i in (0, 2)] == [True, True]
    torch.testing.assert_close(quantized(x), expected, atol=0.05, rtol=0.05)


class TestLeftToPyTorch:
    """Where oneDNN's product would be wrong, unseen or of no use."""

    def test_small_products(self, products, monkeypatch):
        monkeypatch.setattr(module, "WORTH", 4 * 8 * 16 + 1)
        linear(_random(4, 8), _random(16, 8))
        assert not products

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_types(self, products, dtype):
        x, weight = _random(4, 8).to(dtype), _random(16, 8).to(dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert not products

    def test_autocast(self, products):
        with torch.autocast("cpu", torch.bfloat16):
            assert Linear(8, 16)(_random(4, 8)).dtype is torch.bfloat16
        assert not products

    def test_switched_off(self, products):
        with torch.backends.mkldnn.flags(enabled=False):
            linear(_random(4, 8), _random(16, 8))
        assert not products

    def test_wrong_shapes(self):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(_random(4, 8), _random(16, 9))

    def test_flops_are_counted(self, products):
        with FlopCounterMode(display=False) as counter:
            Linear(8, 16)(_random(4, 8))
        assert counter.get_total_flops() == 2 * 4 * 8 * 16
        assert not products

    def test_forward_mode(self, products):
        x, tangent, weight = _random(4, 8), _random(4, 8), _random(16, 8)
        with forward_ad.dual_level():
            dual = linear(forward_ad.make_dual(x, tangent), weight)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, F.linear(tangent, weight))
        assert not products

    def test_transforms(self, products):
        layer, x = Linear(8, 16), _random(4, 8)
        mapped = torch.func.vmap(layer)(x)
        torch.testing.assert_close(mapped, F.linear(x, layer.weight, layer.bias))
        assert not products

    def test_compile(self, products):
        layer, x = Linear(8, 16), _random(4, 8)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
        assert not products

    def test_export(self, products):
        program = torch.export.export(nn.Sequential(Linear(8, 16)), (_random(4, 8),))
        assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
            torch.ops.aten.linear.default
        ]
        assert not products

    def test_tracing_and_scripting(self, products):
        model, x = nn.Sequential(Linear(8, 16)), _random(4, 8)
        expected = F.linear(x, model[0].weight, model[0].bias)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), expected)
        assert not products
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), expected)
        assert len(products) == 1
        torch.testing.assert_close(torch.jit.script(traced)(x), expected)

    @pytest.mark.parametrize("bias", [torch.ones(1), torch.ones(4, 16), torch.ones(())])
    def test_biases_that_are_broadcast(self, products, bias):
        x, weight = _random(4, 8), _random(16, 8)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        assert not products

    @pytest.mark.parametrize("bias", [torch.ones(5), torch.ones(16, dtype=torch.float64)])
    def test_biases_that_do_not_fit(self, bias):
        with pytest.raises(RuntimeError) as expected:
            F.linear(_random(4, 8), _random(16, 8), bias)
        with pytest.raises(RuntimeError) as found:
            linear(_random(4, 8), _random(16, 8), bias)
        assert str(found.value) == str(expected.value)

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
    def test_other_layouts(self, products):
        x, weight = _random(4, 8), _random(16, 8)
        torch.testing.assert_close(linear(x, weight.to_sparse_csr()), F.linear(x, weight))
        torch.testing.assert_close(linear(x.to_mkldnn(), weight.to_mkldnn()).to_dense(), F.linear(x, weight))
        assert not products


@pytest.fixture
def sums(monkeypatch):
    """The shapes that are summed over their rows, on a CPU that multiplies halves as CUDA does."""
    shapes = []

    def summed(rows: Tensor) -> Tensor:
        shapes.append(tuple(rows.shape))
        return rows.double().sum(0).float()

    monkeypatch.setattr(front, "_multiplies_halves", lambda device: True)
    monkeypatch.setattr(front, "_sum_rows", summed)
    monkeypatch.setattr(front, "WORTH", 4)
    return shapes


class TestBiasGradients:
    """By a product with ones, over what no CPU multiplies: the product itself is tested on a GPU."""

    @pytest.mark.parametrize("lead", [(6,), (2, 3), (2, 3, 5)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_values_and_gradients(self, sums, lead, dtype):
        layer, exact = Linear(8, 16, dtype=dtype), nn.Linear(8, 16, dtype=torch.float64)
        exact.load_state_dict(layer.state_dict())
        x = _random(*lead, 8).to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        layer(x).sigmoid().sum().backward()
        exact(wide).sigmoid().sum().backward()
        assert sums == [(x.numel() // 8, 16)]
        pairs = [(x, wide), (layer.weight, exact.weight), (layer.bias, exact.bias)]
        for found, expected in pairs:
            assert found.grad.dtype is dtype
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=2e-2, atol=2e-2)

    def test_autocast_gives_the_bias_what_was_summed(self, sums):
        layer = Linear(8, 16)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(_random(6, 8))
        assert output.dtype is torch.bfloat16
        output.backward(grad := _random(6, 16).bfloat16())
        assert torch.equal(layer.bias.grad, grad.double().sum(0).float())  # not rounded to bfloat16

    def test_the_result_may_be_changed_in_place(self, sums):
        layer, x = Linear(8, 16, dtype=torch.bfloat16), _random(2, 3, 8).bfloat16()
        F.relu(layer(x), inplace=True).sum().backward()
        expected = torch.autograd.grad(F.relu(F.linear(x, layer.weight, layer.bias)).sum(), layer.bias)
        assert torch.equal(layer.bias.grad, *expected)
        assert len(sums) == 1

    def test_second_derivative(self, sums):
        x, weight, bias = (_random(*shape).bfloat16().requires_grad_() for shape in ((6, 8), (16, 8), (16,)))

        def penalty(product):
            (grad,) = torch.autograd.grad(product(x, weight, bias).pow(3).sum(), bias, create_graph=True)
            return torch.autograd.grad(grad.float().square().sum(), (x, weight, bias))

        for found, expected in zip(penalty(linear), penalty(F.linear), strict=True):
            torch.testing.assert_close(found, expected, rtol=5e-2, atol=1)
        assert len(sums) == 1  # of the second derivative, which nobody differentiates

    def test_bias_alone_and_bias_frozen(self, sums):
        layer, x = Linear(8, 16, dtype=torch.bfloat16), _random(6, 8).bfloat16()
        layer.weight.requires_grad_(False)
        layer(x).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((16,), 6.0).bfloat16())
        layer.weight.requires_grad_(True)
        layer.bias.requires_grad_(False)
        layer(x).sum().backward()
        assert len(sums) == 1

    @pytest.mark.parametrize(
        ("rows", "dtype", "records"), [(3, torch.bfloat16, True), (6, torch.float32, True), (6, torch.bfloat16, False)]
    )
    def test_left_to_pytorch(self, sums, rows, dtype, records):
        layer = Linear(8, 16, dtype=dtype)
        with torch.set_grad_enabled(records):
            output = layer(_random(rows, 8).to(dtype))
        if records:
            output.sum().backward()
        assert not sums

    def test_compile_and_transforms(self, sums):
        layer, x = Linear(8, 16, dtype=torch.bfloat16), _random(6, 8).bfloat16()
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
        parameters = dict(layer.named_parameters())
        torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters)
        assert not sums
