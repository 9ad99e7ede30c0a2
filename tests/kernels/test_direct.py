"""Calls past the dispatcher: taken where nobody listens, and only there; nothing about a call is taken for granted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import calls, na2d, operators


def qkv(*, seed: int = 0, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 5, 6, 2, 4, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


def attend(*tensors: Tensor, **options: Any) -> Tensor:
    return na2d(*tensors, 3, backend="reference", **options)


class Watched:
    """An operator that notes its calls."""

    def __init__(self, operator: Any, seen: list[str]) -> None:
        self._operator = operator
        self._seen = seen

    def __call__(self, *inputs: Any) -> Any:
        self._seen.append(self._operator._opname)
        return self._operator(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that have gone by the dispatcher."""
    seen: list[str] = []
    calls.forget()
    monkeypatch.setattr(operators, "forward", Watched(operators.forward, seen))
    monkeypatch.setattr(operators, "backward", Watched(operators.backward, seen))
    return seen


def test_the_first_call_is_dispatched_and_the_next_are_not(dispatched: list[str]) -> None:
    for seed in range(3):
        tensors = qkv(seed=seed)
        expected = operators._forward(*tensors, None, None, None, (3, 3), (1, 1), (1, 1), (False, False), 0.5, None)[0]
        torch.testing.assert_close(attend(*tensors), expected)
    assert dispatched == ["forward"]


def test_gradients_of_calls_like_earlier_ones(dispatched: list[str]) -> None:
    rpb = torch.randn(2, 5, 5)
    for seed in range(3):
        leaves = [*qkv(seed=seed, requires_grad=True), rpb.clone().requires_grad_()]
        doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
        (output, lse), (exact, exact_lse) = (attend(*t[:3], rpb=t[3], return_lse=True) for t in (leaves, doubles))
        found = torch.autograd.grad(output.square().sum() + lse.sum(), leaves)
        expected = torch.autograd.grad(exact.square().sum() + exact_lse.sum(), doubles)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert dispatched == ["forward", "forward", "backward", "backward"]  # of each type


def test_grad_mode_and_what_requires_a_gradient_are_looked_at_every_time(dispatched: list[str]) -> None:
    plain, leaves = qkv(), qkv(requires_grad=True)
    for _ in range(2):
        assert not attend(*plain).requires_grad
        assert attend(*leaves).requires_grad
        assert attend(*plain[:2], leaves[2]).requires_grad
        with torch.no_grad():
            assert not attend(*leaves).requires_grad
        with torch.inference_mode():
            assert attend(*plain).is_inference()
    assert dispatched == ["forward"] * 4


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        Functions,
        Operators,
        torch.autograd.profiler.profile,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.forward_ad.dual_level,
        lambda: torch.device("cpu"),
    ],
)
def test_who_listens_is_heard(dispatched: list[str], context: Any) -> None:
    tensors = qkv()
    for _ in range(2):
        attend(*tensors)
    dispatched.clear()
    with context():
        for _ in range(2):
            attend(*tensors)
    assert dispatched == ["forward"] * 2


class Subclass(Tensor):
    pass


def test_tensors_that_are_more_than_they_seem_are_dispatched(dispatched: list[str]) -> None:
    tensors = qkv()
    interleaved = torch.randn(1, 5, 6, 2, 4, dtype=torch.complex64)
    plain, negative = interleaved.imag, interleaved.conj().imag
    assert negative.is_neg()
    for _ in range(2):
        attend(plain, *tensors[1:])
        attend(*tensors)
    dispatched.clear()
    torch.testing.assert_close(attend(negative, *tensors[1:]), attend(-plain, *tensors[1:]))
    assert isinstance(attend(tensors[0].as_subclass(Subclass), *tensors[1:]), Subclass)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
    assert attend(*fakes).shape == tensors[0].shape
    assert dispatched == ["forward"] * 3  # -plain is like tensors[0]


def test_tracers_record_the_operator() -> None:
    tensors = qkv()
    for _ in range(2):
        attend(*tensors)
    graph = make_fx(attend)(*tensors).graph
    assert "fastna.forward" in str(graph)
    with pytest.raises(RuntimeError, match="Tracing a list of bool type"):  # PyTorch's own limit, not a constant
        torch.jit.trace(lambda *inputs: attend(*inputs), tensors, check_trace=False)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))
    with pytest.raises(RuntimeError, match=r"not differentiated by torch\.func"):
        torch.func.grad(lambda query: attend(query, *tensors[1:]).sum())(tensors[0])


def test_equal_options_of_other_types_are_still_refused() -> None:
    query, key, value = qkv()
    for kernel_size, wrong in ((1, True), (3, 3.0), ((3, 3), (3.0, 3)), ((1, 1), (1, True))):
        for _ in range(2):
            na2d(query, key, value, kernel_size)
        for _ in range(2):
            with pytest.raises(TypeError, match="must be an int"):
                na2d(query, key, value, wrong)
    for _ in range(2):
        na2d(query, key, value, 3, scale=1.0)
    with pytest.raises(TypeError, match="scale=True must be a float"):
        na2d(query, key, value, 3, scale=True)


def test_fresh_options_are_compared_not_dispatched(dispatched: list[str]) -> None:
    tensors = qkv()
    for size in (3, 3, 3):
        na2d(*tensors, (size, size), scale=size**-0.5, backend="reference")
    assert dispatched == ["forward"]


def test_other_sizes_strides_and_alignments_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(1, 5, 6, 3, 2, 4, generator=generator)
    shifted = torch.cat([torch.zeros(1), packed.flatten()])[1:].view(packed.shape)
    for tensors in (packed.unbind(3), [t.contiguous() for t in packed.unbind(3)], shifted.unbind(3)):
        for _ in range(2):
            exact = attend(*(t.double() for t in tensors))
            torch.testing.assert_close(attend(*tensors).double(), exact, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(attend(*(t[:, :4] for t in tensors)).shape, torch.Size((1, 4, 6, 2, 4)))
