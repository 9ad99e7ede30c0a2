"""`native` against `reference` on random problems, and what it does where it cannot be compiled."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_calls import Call, assert_same, calls, results

from kernels import calls as bound_calls
from kernels import explain, na1d, na2d, neighborhood_attention
from kernels.cpu import build, native
from kernels.errors import CompilationError
from kernels.problem import Axis

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="`native` wants a C++ compiler, and there is none here",
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_exact(call: Call, dtype: torch.dtype) -> None:
    tensors = call.tensors(dtype)
    found = results(call, tensors, "native")
    exact = results(call, {name: tensor.double() for name, tensor in tensors.items()}, "reference")
    assert_same(found, exact, TOLERANCES[dtype])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), cache=st.sampled_from((1, 4000, 1 << 20)), dtype=st.sampled_from(sorted(TOLERANCES, key=str)))
def test_equals_reference(call: Call, cache: int, dtype: torch.dtype) -> None:
    """With tasks of all sizes, down to as few queries as there are keys in a window."""
    native._plan.cache_clear()
    with mock.patch.object(native, "CACHE_BYTES", cache), mock.patch.object(native, "WORK_PER_THREAD", 1):
        assert_exact(call, dtype)
    native._plan.cache_clear()


WINDOWS = {"stride": (1, 1), "is_causal": (False, False)}
LONG = {"kernel_size": (301,), "dilation": (1,), "stride": (64,), "is_causal": (True,)}


@pytest.mark.parametrize(
    "call",
    [
        Call(2, (56, 10), 2, 1, 32, 32, True, 0, None, 0, WINDOWS | {"kernel_size": (7, 7), "dilation": (1, 1)}),
        Call(1, (20, 40), 1, 2, 64, 48, True, 5, None, 1, WINDOWS | {"kernel_size": (9, 19), "dilation": (2, 2)}),
        Call(1, (14, 34), 2, 1, 20, 132, False, 17, None, 2, WINDOWS | {"kernel_size": (11, 8), "dilation": (1, 3)}),
        Call(1, (600,), 1, 1, 256, 16, True, 0, 0.1, 3, LONG),
    ],
    ids=["nat", "grouped heads", "wide values", "long"],
)  # fmt: skip
def test_sizes_beyond_the_random_ones(call: Call) -> None:
    assert_exact(call, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_do_not_inherit_the_rounding_of_the_output(dtype: torch.dtype) -> None:
    """The sum over many queries nearly cancels, and delta from an output in 16 bits would be most of what is left."""
    axes = {"kernel_size": (1, 4), "dilation": (5, 1), "stride": (1, 2), "is_causal": (False, False)}
    for seed in range(60):
        assert_exact(Call(1, (5, 4), 1, 1, 1, 4, False, 1, -0.7, seed, axes), dtype)


def test_lse_of_a_bias_in_16_bits_is_that_of_float32() -> None:
    tensors = Call(1, (9, 8), 2, 1, 4, 4, True, 0, None, 0, WINDOWS | {"kernel_size": (3, 3)}).tensors()
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    found, expected = (
        neighborhood_attention(**tensors, kernel_size=3, return_lse=True, backend=backend)[1]
        for backend in ("native", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_defaults_of_dtype_and_device_change_nothing() -> None:
    call = Call(1, (9, 8), 2, 1, 4, 4, True, 2, None, 0, WINDOWS | {"kernel_size": (3, 3), "dilation": (1, 1)})
    tensors = call.tensors(torch.float32)
    expected = results(call, tensors, "native")
    torch.set_default_dtype(torch.float64)
    try:
        found = results(call, tensors, "native")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected, 0)
    native._window_table.cache_clear()
    native._plan.cache_clear()
    with torch.device("meta"):
        output = neighborhood_attention(**tensors, **call.windows, backend="native")
    torch.testing.assert_close(output, expected["output"], rtol=0, atol=0)


def test_packed_qkv_and_the_same_bits_twice() -> None:
    qkv = torch.randn(2, 9, 9, 3, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rpb = torch.zeros(2, 9, 9, requires_grad=True)

    def attend() -> list[torch.Tensor]:
        qkv.grad = rpb.grad = None
        output = na2d(*qkv.unbind(3), 5, rpb=rpb, backend="native")
        output.sum().backward()
        assert qkv.grad is not None
        assert rpb.grad is not None
        return [output, qkv.grad, rpb.grad]

    first = attend()
    assert all(torch.equal(a, b) for a, b in zip(first, attend(), strict=True))
    expected = na2d(*(part.double() for part in qkv.unbind(3)), 5, rpb=rpb.double(), backend="reference")
    torch.testing.assert_close(first[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", [0, 7, 8, 19])
def test_nan_reaches_its_window_and_no_further(position: int) -> None:
    query, key, value, gradient = torch.randn(4, 1, 20, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    windows = [Axis(20, 5).window_at(query, 20) for query in range(20)]
    sees = torch.tensor([start <= position < end for start, end in windows])
    for spoiled in (key, value):
        kept = spoiled[0, position].clone()
        spoiled[0, position] = torch.nan
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = na1d(*leaves, 5, backend="native")
        assert torch.equal(output[0, :, 0].isnan().any(-1), sees)
        output.backward(gradient)
        assert leaves[0].grad is not None
        assert torch.equal(leaves[0].grad[0, :, 0].isnan().any(-1), sees)
        spoiled[0, position] = kept


def test_arguments_are_laid_out_as_the_compiler_does() -> None:
    assert build.library().fastna_arguments_size() == ctypes.sizeof(native.Arguments)
    assert build.library().fastna_wide() == native.PADDING


@pytest.fixture
def nothing_compiled(tmp_path, monkeypatch) -> Iterator[None]:
    """A machine on which nothing was compiled yet."""
    monkeypatch.setenv("FASTNA_CACHE_DIR", str(tmp_path))
    for cached in (build.library, build.why_not_here):
        cached.cache_clear()
    bound_calls.forget()
    yield
    for cached in (build.library, build.why_not_here):
        cached.cache_clear()
    bound_calls.forget()


def test_without_a_compiler_tiled_serves(nothing_compiled, monkeypatch) -> None:
    tensors = torch.randn(3, 1, 9, 1, 4).unbind(0)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    explanation = explain(*tensors, 3)
    assert explanation.backend == "tiled"
    assert explanation.reasons["native"] == (
        "It is compiled for this processor, and g++, clang++ and c++ are not installed."
    )
    assert na1d(*tensors, 3).shape == (1, 9, 1, 4)
    with pytest.raises(ValueError, match="backend='native' does not serve this call: It is compiled"):
        na1d(*tensors, 3, backend="native")


def test_a_compiler_that_fails_is_named(nothing_compiled, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "g++ -fno-such-option")
    assert explain(*torch.randn(3, 1, 9, 1, 4).unbind(0), 3).reasons["native"] == "G++ rejects attention.cpp."
    with pytest.raises(CompilationError, match="fno-such-option"):
        build.library()


def test_what_it_leaves_to_others() -> None:
    query = torch.randn(1, 9, 1, 4, dtype=torch.float64)
    explanation = explain(query, query, query, 3)
    assert explanation.backend == "tiled"
    assert explanation.reasons["native"] == "It computes in float32; the tensors are float64."
