"""Calls that are worked out once stay right when anything that they depend on changes; and are not worked out again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from emulator import EmulatorRuntime
from torch import Tensor

from kernels import calls, na2d
from kernels.cuda import block, flash, strip
from kernels.cuda.dry import DryKernel, DryRuntime
from kernels.cuda.jit import KernelSource
from kernels.cuda.runtime import use_runtime


def projection(dtype: torch.dtype, *space: int, heads: int = 1, head_dim: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(1, *space, 3, heads, head_dim, generator=generator).to(dtype).unbind(-3))


def assert_right(tensors: list[Tensor], rpb: Tensor | None = None, **options: object) -> None:
    found = na2d(*tensors, 7, rpb=rpb, backend="fused", **options)
    exact = na2d(*(t.double() for t in tensors), 7, rpb=None if rpb is None else rpb.double(), **options)
    assert (found.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The family of every forward pass that is worked out."""
    worked_out = []

    def counting(module: object, original: Callable[..., object]) -> Callable[..., object]:
        def bind(*arguments: object) -> object:
            worked_out.append(module.__name__.rpartition(".")[2])
            return original(*arguments)

        return bind

    for module in (block, strip, flash):
        monkeypatch.setattr(module, "bind_forward", counting(module, module.bind_forward))
    return worked_out


def test_the_same_kind_is_worked_out_once_and_reads_the_new_tensors(
    emulator: EmulatorRuntime, bindings: list[str]
) -> None:
    for seed in range(3):
        assert_right(projection(torch.float16, 9, 8, seed=seed))
    assert bindings == ["strip"]


def test_whatever_matters_makes_another_kind(emulator: EmulatorRuntime, bindings: list[str]) -> None:
    """Each call in turn differs from the first in one thing, and each is asked for twice."""
    base = projection(torch.float16, 9, 8)
    rpb = torch.randn(1, 13, 13)
    apart = [t.contiguous() for t in base]
    shifted = [torch.cat([t.new_zeros(4), t.flatten()])[4:].view(t.shape) for t in apart]  # 8 bytes past 16
    one_shifted = [apart[0], shifted[1], apart[2]]
    for tensors in (base, apart, shifted, one_shifted, [t.bfloat16() for t in base]):
        for _ in range(2):
            assert_right(tensors)
    for _ in range(2):
        assert_right(base, scale=0.5)
        assert_right(base, is_causal=True)
        assert_right(base, rpb)
        assert_right(base, rpb.half())
    assert bindings == ["strip", "strip", "flash", "flash", "strip", "strip", "flash", "strip", "strip"]


@pytest.fixture
def float32_precision() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.usefixtures("float32_precision")
def test_tf32_is_a_setting_that_matters(emulator: EmulatorRuntime) -> None:
    tensors = projection(torch.float32, 7, 7)
    for precision, kernel in (("ieee", "ExactFloat"), ("tf32", "TensorCoreTf32")):
        torch.backends.cuda.matmul.fp32_precision = precision
        na2d(*tensors, 7, stride=2, backend="fused")
        assert any(kernel in source.name for source in emulator.kernels)


def test_gradients_of_either_grad_mode_and_layout(emulator: EmulatorRuntime) -> None:
    """Recorded after unrecorded; an incoming gradient that is expanded after one that is contiguous."""
    tensors = [t.contiguous() for t in projection(torch.float16, 7, 14)]
    with torch.no_grad():
        plain = na2d(*tensors, 7, dilation=(1, 2), backend="fused")
    leaves = [t.clone().requires_grad_() for t in tensors]
    doubles = [t.double().requires_grad_() for t in tensors]
    output = na2d(*leaves, 7, dilation=(1, 2), backend="fused")
    assert torch.equal(output, plain)
    exact = na2d(*doubles, 7, dilation=(1, 2))
    incoming = torch.randn_like(output)
    transposed = incoming.transpose(1, 2).contiguous().transpose(1, 2)
    for gradient in (incoming, incoming[..., :1].expand_as(output), transposed):
        found = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
        expected = torch.autograd.grad(exact, doubles, gradient.double(), retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            assert (one.double() - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("backend", ["naive", "gemm", "fused"])
def test_no_kernel_is_asked_for_twice(backend: str) -> None:
    """In either direction, with all options: what is asked for the first time is launched from then on."""
    asked: list[KernelSource] = []

    class Asked(DryRuntime):
        def kernel(self, source: KernelSource, device: torch.device) -> DryKernel:
            asked.append(source)
            return super().kernel(source, device)

    with use_runtime("cpu", Asked()):
        for seed in range(2):
            asked_before = len(asked)
            leaves = [t.contiguous().requires_grad_() for t in projection(torch.float32, 7, 8, seed=seed)]
            rpb = torch.randn(1, 13, 13, requires_grad=True)
            extra = torch.randn(1, 3, 1, 32, requires_grad=True)
            additional = {"additional_keys": extra, "additional_values": extra}
            na2d(*leaves, 7, rpb=rpb, **additional, backend=backend).sum().backward()
            assert all(leaf.grad is not None for leaf in (*leaves, rpb, extra))
    assert asked_before == len(asked) > 2


@pytest.mark.parametrize("backend", ["fused", "tiled"])
def test_what_is_kept_holds_on_to_no_tensor(emulator: EmulatorRuntime, backend: str) -> None:
    leaves = [t.contiguous().requires_grad_() for t in projection(torch.float16, 7, 8)]
    output = na2d(*leaves, 7, backend=backend)
    output.sum().backward()
    references = [weakref.ref(t) for t in (*leaves, output)]
    del leaves, output
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_another_runtime_is_not_given_calls_bound_for_the_last() -> None:
    tensors = projection(torch.float16, 7, 7)
    for seed in range(2):
        emulator = EmulatorRuntime(seed)
        with use_runtime("cpu", emulator):
            na2d(*tensors, 7, backend="fused")
        assert emulator.launches == 1


def test_kinds_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_bound", {})
    monkeypatch.setattr(calls, "MOST_KINDS", 3)
    for size in range(7, 17):
        na2d(*(torch.randn(1, 7, size, 1, 4) for _ in range(3)), 7)
    assert 0 < len(calls._bound) <= 3
