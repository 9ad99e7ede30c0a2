"""Linear layers on a CPU by oneDNN, where MKL is the slower of the two libraries that PyTorch brings.

PyTorch multiplies float32 matrices by MKL on every x86 processor. MKL keeps to AVX2 where the processor is not Intel's;
oneDNN, which PyTorch has for convolutions and half precision, takes AVX-512 wherever there is one: twice as fast on an
AMD Zen 4 or 5. Nothing here computes: products and their gradients go to oneDNN where that pays, and to PyTorch's own
function everywhere else.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import direct


def _is_amd() -> bool:
    """Whether this is an AMD processor; on Linux, `platform` does not say whose it is."""
    cpus = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpus.read_text() if cpus.exists() else platform.processor())


ONEDNN_IS_FASTER = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and _is_amd()
)
"""Decided by what the machine is, not by a measurement: every process and every run multiply alike, bit for bit."""

WORTH = 1 << 22
"""Multiplications from which oneDNN's dearer call, some 12 us, is made up for."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: `x` [..., in] by `weight` [out, in] plus `bias` [out], as [..., out]."""
    if not (ONEDNN_IS_FASTER and _is_eager() and _pays(x, weight, bias)):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        all(_is_plain(tensor) for tensor in (x, weight, bias) if tensor is not None)
        and x.shape[-1:] == weight.shape[1:]  # what does not fit is PyTorch's to refuse, or to broadcast
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() * weight.shape[0] >= WORTH
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether these are float32 numbers in the memory of a CPU: no subclass, not sparse, not in oneDNN's layout."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
    )


def _is_eager() -> bool:
    return bool(torch.backends.mkldnn.enabled) and not torch.is_autocast_enabled("cpu") and direct.is_eager()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN reads it as if it were
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")
    return product


def _dense(matrix: Tensor) -> Tensor:
    """`matrix` by rows or by columns without gaps: for any other layout oneDNN has loops a thousand times slower."""
    by_columns = matrix.dim() == 2 and matrix.t().is_contiguous()
    return matrix if by_columns else matrix.contiguous()


class _Linear(torch.autograd.Function):
    """The gradients are products of the same kind, themselves differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.t()) if needs_x else None,
            _over_rows(rows, x.reshape(-1, x.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _over_rows(a: Tensor, b: Tensor) -> Tensor:
    """`aᵀ b` of `a` [rows, m] and `b` [rows, n]. oneDNN is up to four times faster with the narrower on the left."""
    if a.shape[1] <= b.shape[1]:
        return linear(a.t(), b.t())
    return linear(b.t(), a.t()).t()
