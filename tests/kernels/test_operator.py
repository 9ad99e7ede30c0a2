"""What the operator promises whatever computes it: derivatives, options, autocast, compilation, bad input."""

from __future__ import annotations

import math
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch
from operator_calls import Call, assert_same, results
from torch import Tensor

import kernels
from kernels import explain, merge_attentions, na1d, na2d, na3d, neighborhood_attention, operators

BACKENDS = ["reference", "tiled"]
SLIDING = {"kernel_size": (3, 4), "dilation": (2, 1), "stride": (1, 3), "is_causal": (False, True)}
SLIDING_CALL = Call(2, (7, 9), 2, 2, 4, 3, True, 2, None, seed=0, windows=SLIDING)
DENSE = {"kernel_size": (3, 2), "dilation": (2, 4), "stride": (1, 1), "is_causal": (False, False)}
DENSE_CALL = Call(2, (6, 8), 2, 1, 4, 4, True, 0, None, seed=1, windows=DENSE)


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [SLIDING_CALL, DENSE_CALL], ids=["sliding", "dense"])
def test_gradcheck(call: Call, backend: str) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in call.tensors().items()}

    def attend(*values: Tensor) -> Any:
        named = dict(zip(tensors, values, strict=True))
        return neighborhood_attention(**named, **call.windows, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(attend, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("call", [SLIDING_CALL, DENSE_CALL], ids=["sliding", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_precision_of_tiled(call: Call, dtype: torch.dtype, tolerance: float) -> None:
    tensors = call.tensors(dtype)
    found = results(call, tensors, "tiled")
    exact = results(call, {name: tensor.double() for name, tensor in tensors.items()}, "reference")
    assert {tensor.dtype for name, tensor in found.items() if name != "lse"} == {dtype}
    assert_same(found, exact, tolerance)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_by_rank(rank: int) -> None:
    tensors = qkv(1, *[5] * rank, 2, 4)
    function = [na1d, na2d, na3d][rank - 1]
    torch.testing.assert_close(
        function(*tensors, 3), neighborhood_attention(*tensors, (3,) * rank, backend="reference")
    )
    other = rank % 3 + 1
    with pytest.raises(ValueError, match=f"na{other}d takes"):
        [na1d, na2d, na3d][other - 1](*tensors, 3)


def test_full_window_is_scaled_dot_product_attention() -> None:
    query, key, value = qkv(2, 4, 5, 2, 8)
    heads_first = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first)
    found = na2d(query, key, value, (4, 5))
    torch.testing.assert_close(found, expected.transpose(1, 2).unflatten(1, (4, 5)))


def test_windows_may_come_as_any_sequence_of_any_integers() -> None:
    tensors = qkv(1, 8, 9, 2, 4)
    expected = na2d(*tensors, (3, 4), dilation=2, scale=0.5)
    for window in ([3, 4], torch.Size((3, 4)), (np.int64(3), np.int8(4)), UserList((3, 4))):
        assert torch.equal(na2d(*tensors, window, dilation=np.int32(2), scale=np.float32(0.5)), expected)


def test_packed_projection_is_read_in_place() -> None:
    packed = torch.randn(2, 6, 7, 3, 2, 4)
    slices = packed.unbind(3)
    torch.testing.assert_close(na2d(*slices, 3), na2d(*(s.contiguous() for s in slices), 3))
    scattered = [s.movedim(-1, 1).contiguous().movedim(1, -1) for s in slices]
    torch.testing.assert_close(na2d(*scattered, 3), na2d(*slices, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_outside_the_map_is_never_read(backend: str) -> None:
    """The tensors lie inside larger ones full of NaN, in every dimension."""
    inside = qkv(2, 7, 5, 2, 4)
    poisoned = []
    for tensor in inside:
        around = torch.full([size + 4 for size in tensor.shape], math.nan)
        hole = around[2:-2, 2:-2, 2:-2, 2:-2, 2:-2]
        hole.copy_(tensor)
        poisoned.append(hole)
    torch.testing.assert_close(na2d(*poisoned, (3, 2), backend=backend), na2d(*inside, (3, 2), backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    call = Call(0, (6, 7), 1, 2, 4, 3, True, 2, None, seed=0, windows=SLIDING | {"kernel_size": (3, 3)})
    found = results(call, call.tensors(torch.float32), backend)
    assert found["output"].shape == (0, 6, 7, 2, 3)
    assert found["lse"].shape == (0, 6, 7, 2)
    assert torch.equal(found["grad rpb"], torch.zeros(2, 5, 5))


def test_zero_scale_averages_the_window() -> None:
    query, key, value = qkv(1, 9, 1, 4)
    found = na1d(query, key, value, 3, scale=0.0)
    torch.testing.assert_close(found[0, 4], value[0, 3:6].mean(0))


def test_merged_attentions_equal_attention_over_the_union() -> None:
    query, key, value = (t.double().requires_grad_() for t in qkv(2, 5, 6, 2, 4))
    more = [t.double().requires_grad_() for t in qkv(2, 3, 2, 4)[:2]]

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.square().sum(), (query, key, value, *more))

    together = na2d(query, key, value, 3, additional_keys=more[0], additional_values=more[1])
    window = na2d(query, key, value, 3, return_lse=True)
    scores = torch.einsum("bhwnd,bknd->bhwnk", query, more[0]) / 2
    extra = torch.einsum("bhwnk,bknd->bhwnd", scores.softmax(-1), more[1]), scores.logsumexp(-1)
    merged, _ = merge_attentions(*zip(window, extra, strict=True))
    torch.testing.assert_close(merged, together)
    for found, expected in zip(gradients(merged), gradients(together), strict=True):
        torch.testing.assert_close(found, expected)


def test_merge_of_an_empty_set_changes_nothing() -> None:
    output, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    merged, merged_lse = merge_attentions((output, torch.zeros_like(output)), (lse, torch.full_like(lse, -math.inf)))
    torch.testing.assert_close((merged, merged_lse), (output, lse))


def test_autocast_keeps_rpb_in_float32() -> None:
    query, key, value = (t.requires_grad_() for t in qkv(1, 5, 6, 2, 4))
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, lse = na2d(query, key.bfloat16(), value, 3, rpb=rpb, return_lse=True)
        output.float().sum().backward()
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (query.grad.dtype, rpb.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(output.float(), na2d(query, key, value, 3, rpb=rpb), atol=3e-2, rtol=3e-2)


def test_autocast_compiles_and_casts_the_same() -> None:
    tensors = [t.requires_grad_() for t in qkv(1, 5, 6, 2, 4)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return na2d(query, key, value, 3)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    outputs = [function(*tensors) for function in (attend, compiled)]
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.float().sum(), tensors) for output in outputs]
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("call", [SLIDING_CALL, DENSE_CALL], ids=["sliding", "dense"])
def test_opcheck(call: Call) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in call.tensors(torch.float32).items()}
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    windows = [list(values) for values in call.windows.values()]
    torch.library.opcheck(operators.forward, (*(tensors.get(name) for name in names), *windows, 0.5, None))


def test_compiles_whole_with_a_dynamic_batch() -> None:
    module = kernels.NeighborhoodAttention2d(8, 2, 3, dilation=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 7, 8, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(module(x).square().sum(), x)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(found, expected)


def test_exports_with_a_dynamic_batch() -> None:
    module = kernels.NeighborhoodAttention2d(8, 2, 3).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (torch.randn(2, 7, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 7, 8, 8)
    torch.testing.assert_close(program.module()(x), module(x))


def test_second_derivative_is_refused() -> None:
    query, key, value = (t.requires_grad_() for t in qkv(1, 5, 1, 4))
    (grad,) = torch.autograd.grad(na1d(query, key, value, 3).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_torch_func_differentiates_the_decomposed_operator() -> None:
    query, key, value = qkv(1, 5, 1, 4)

    def loss(q: Tensor) -> Tensor:
        return na1d(q, key, value, 3).square().sum()

    with pytest.raises(RuntimeError, match=r"not differentiated by torch\.func .* kernels\.decomposed"):
        torch.func.grad(loss)(query)
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    with kernels.decomposed():
        torch.testing.assert_close(torch.func.grad(loss)(query), expected)


def test_forward_mode_is_refused_not_zero() -> None:
    query, key, value = qkv(1, 5, 1, 4)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: na1d(q, key, value, 3), (query,), (query,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        na1d(torch.autograd.forward_ad.make_dual(query, query), key, value, 3)


def test_explain_names_every_backend() -> None:
    explanation = explain(*qkv(1, 8, 8, 2, 4), 3)
    backend = "tiled" if explanation.reasons["native"] else "native"  # without a C++ compiler
    assert explanation.backend == backend
    assert list(explanation.reasons) == ["fused", "gemm", "naive", "native", "tiled", "reference"]
    assert all(explanation.reasons[name] for name in ("fused", "gemm", "naive"))
    assert str(explanation).startswith(f"{backend} serves this call.")
    assert explain(*qkv(1, 30, 30, 1, 4), 23).backend == "tiled"


Q = torch.zeros(1, 6, 7, 4, 8)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("not a tensor", {"key": [1]}, TypeError, "key must be a Tensor, not list"),
    ("sparse", {"key": Q.to_sparse()}, TypeError, "key has layout torch.sparse_coo"),
    ("rank", {"query": Q[0, 0]}, ValueError, "query has 3 dimensions"),
    ("key rank", {"key": Q[0]}, ValueError, "key has 4 dimensions"),
    ("layout", {"value": Q.transpose(1, 3)}, ValueError, "value has batch and space"),
    ("integers", {"query": Q.long(), "key": Q.long(), "value": Q.long()}, TypeError, "query has dtype torch.int64"),
    ("dtype", {"value": Q.double()}, TypeError, "value has dtype torch.float64, query has torch.float32"),
    ("device", {"key": Q.to("meta")}, ValueError, "key is on meta, query on cpu"),
    ("head_dim", {"key": Q[..., :4]}, ValueError, "key has head_dim 4, query has 8"),
    ("key heads", {"key": Q[..., :2, :]}, ValueError, "key has 2 heads, value has 4"),
    ("GQA", {"key": Q[..., :3, :], "value": Q[..., :3, :]}, ValueError, "query has 4 heads, key and value have 3"),
    ("no heads", dict.fromkeys(("query", "key", "value"), Q[..., :0, :]), ValueError, "heads is 0"),
    ("window", {"kernel_size": 7}, ValueError, "kernel_size=7 with dilation=1 on axis 0 of length 6"),
    ("dilation", {"dilation": (1, 3)}, ValueError, "kernel_size=3 with dilation=3 on axis 1 of length 7"),
    ("no window", {"kernel_size": 0}, ValueError, "kernel_size=0 on axis 0"),
    ("no dilation", {"dilation": 0}, ValueError, "dilation=0 on axis 0"),
    ("stride", {"stride": 4}, ValueError, "stride=4 on axis 0 of length 6: it must lie between 1 and kernel_size=3"),
    ("axes", {"kernel_size": (3, 3, 3)}, ValueError, "has 3 items, the space has 2 axes"),
    ("float window", {"kernel_size": 3.0}, TypeError, "kernel_size=3.0 must be an int"),
    ("bool window", {"kernel_size": True}, TypeError, "kernel_size=True must be an int"),
    ("int causal", {"is_causal": 1}, TypeError, "is_causal=1 must be a bool"),
    ("NumPy bool", {"dilation": np.True_}, TypeError, r"dilation=np\.True_ must be an int"),
    ("string window", {"kernel_size": "33"}, TypeError, "kernel_size='33' must be an int"),
    ("no windows", {"kernel_size": ()}, ValueError, r"kernel_size=\(\) has 0 items, the space has 2 axes"),
    (
        "dilation alone too large",
        {"kernel_size": 1, "dilation": 9},
        ValueError,
        r"dilation=9 on axis 0 of length 6: .* = 9 must not exceed the length; take dilation <= 6$",
    ),
    ("empty axis", {"query": Q[:, :0], "key": Q[:, :0], "value": Q[:, :0]}, ValueError, "axis must not be empty"),
    ("string causal", {"is_causal": "false"}, TypeError, "is_causal='false' must be a bool"),
    ("scale", {"scale": math.nan}, ValueError, "scale=nan must be finite"),
    ("scale type", {"scale": "1"}, TypeError, "scale='1' must be a float"),
    ("rpb shape", {"rpb": torch.zeros(4, 5, 3)}, ValueError, r"rpb has shape \(4, 5, 3\)"),
    ("rpb dtype", {"rpb": torch.zeros(4, 5, 5).half()}, TypeError, "rpb has dtype torch.float16"),
    ("rpb device", {"rpb": torch.zeros(4, 5, 5, device="meta")}, ValueError, "rpb is on meta"),
    ("half additional", {"additional_keys": torch.zeros(1, 2, 4, 8)}, ValueError, "came without additional_values"),
    (
        "additional shape",
        {"additional_keys": torch.zeros(2, 2, 4, 8), "additional_values": torch.zeros(1, 2, 4, 8)},
        ValueError,
        r"additional_keys has shape \(2, 2, 4, 8\)",
    ),
    (
        "additional count",
        {"additional_keys": torch.zeros(1, 2, 4, 8), "additional_values": torch.zeros(1, 3, 4, 8)},
        ValueError,
        "additional_keys has 2 keys, additional_values has 3",
    ),
    ("no key", {"key": None}, TypeError, "key must be a Tensor, not NoneType"),
    ("no value", {"value": None}, TypeError, "value must be a Tensor, not NoneType"),
    ("backends", {"backend": ["tiled"]}, ValueError, r"backend=\['tiled'\] is unknown; it must be one of"),
    ("backend", {"backend": "cutlass"}, ValueError, "backend='cutlass' is unknown; it must be one of fused, gemm"),
]


@pytest.mark.parametrize(("changed", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        neighborhood_attention(**({"query": Q, "key": Q, "value": Q, "kernel_size": 3} | changed))
    with pytest.raises(error, match=message):
        explain(**({"query": Q, "key": Q, "value": Q, "kernel_size": 3} | changed))


@pytest.mark.parametrize(
    ("outputs", "lses", "error", "message"),
    [
        (Q, [Q[..., 0]], TypeError, "outputs must be a sequence of Tensors, one per set of keys, not Tensor"),
        ([Q, None], [Q[..., 0]] * 2, TypeError, r"outputs\[1\] must be a Tensor, not NoneType"),
        ([], [], ValueError, "outputs has 0 tensors, lses has 0"),
        ([Q, Q[:, 1:]], [Q[..., 0]] * 2, ValueError, r"outputs\[1\] has shape \(1, 5, 7, 4, 8\)"),
        ([Q], [Q], ValueError, r"lses\[0\] has shape \(1, 6, 7, 4, 8\); it must be that of outputs\[0\]"),
    ],
)
def test_what_cannot_be_merged_is_named(outputs: Any, lses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge_attentions(outputs, lses)


@pytest.mark.parametrize("shape", [(1, 8, 7, 7), (1, 7, 8), (1, 7, 7, 7, 8)])
def test_a_module_says_which_layout_it_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"takes \[batch, \*space, dim\], channels last, with a space of 2 axes and dim=8"
    ):
        kernels.NeighborhoodAttention2d(8, 2, 3)(torch.zeros(shape))


def test_a_backend_that_does_not_serve_says_why() -> None:
    with pytest.raises(ValueError, match="backend='fused' does not serve this call: "):
        na2d(Q, Q, Q, 3, backend="fused")
