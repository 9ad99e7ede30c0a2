"""Linear layers: PyTorch's products, on CPUs by the faster of its libraries, and on CUDA with fast bias gradients.

A bias gradient is a sum over all tokens. PyTorch's kernel for it takes two to six times what reading the tokens does,
15 % of a training step of nat_tiny in all; as the product with a row of ones it takes little more than the reading.
`torch.compile` has sums as good and sees PyTorch's own function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import direct
from kernels.cpu import linear as cpu

HALVES = (torch.float16, torch.bfloat16)
"""The types whose products sum in float32; a product of float32 may round what it sums to TF32."""

WORTH = 1 << 10
"""Rows from which the product is the faster one."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: `x` [..., in] by `weight` [out, in] plus `bias` [out], as [..., out]."""
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if bias is not None and _sums_by_product(x, weight, bias):
        # Of one matrix: of more dimensions the product would be a view, which autograd copies when it is marked.
        product = F.linear(x.reshape(-1, x.shape[-1]), weight, bias.detach())
        output: Tensor = _WithBiasGradient.apply(product, bias)
        return output.view(*x.shape[:-1], -1)
    return cpu.linear(x, weight, bias)


torch.fx.wrap("linear")  # tracing records the call instead of looking inside


def _sums_by_product(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the bias wants a gradient of half precision, over enough rows, and nobody listens to how it is made."""
    return (
        _multiplies_halves(x.device)
        and bias.requires_grad
        and torch.is_grad_enabled()
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, weight, bias))
        and _product_type(x) in HALVES
        and bias.shape == weight.shape[:1]
        and x.numel() >= WORTH * max(x.shape[-1], 1)
        and direct.is_eager()
    )


def _multiplies_halves(device: torch.device) -> bool:
    """Whether products of halves with float32 results are at hand there: on CUDA, and not on what goes by its name."""
    return device.type == "cuda" and torch.version.cuda is not None


def _product_type(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _WithBiasGradient(torch.autograd.Function):
    """A product that has its bias already, and from here on the gradient of it too."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(product)  # as if changed, so that it can be returned
        ctx.dtype = bias.dtype
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return grad, None
        rows = grad.reshape(-1, grad.shape[-1])
        is_plain = not torch.is_grad_enabled() and direct.is_eager()
        return grad, (_sum_rows(rows) if is_plain else rows.float().sum(0)).to(ctx.dtype)


def _sum_rows(rows: Tensor) -> Tensor:
    """The sum over the first dimension in float32, whatever PyTorch allows products of halves to round on the way."""
    return torch.mm(_ones(rows), rows, out_dtype=torch.float32)[0]


KEPT_ONES = 1 << 20
_kept_ones: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _ones(rows: Tensor) -> Tensor:
    """A row of as many ones, `[1, len(rows)]`: part of one that is kept, since filling takes a launch."""
    count, kind = rows.shape[0], (rows.dtype, rows.device)
    if count > KEPT_ONES:
        return rows.new_ones(1, count)
    if kind not in _kept_ones:
        if torch.cuda.is_current_stream_capturing():  # they are no ones before the graph runs
            return rows.new_ones(1, count)
        ones = rows.new_ones(1, KEPT_ONES)
        torch.cuda.current_stream(rows.device).synchronize()  # the next to read them may be on another stream
        _kept_ones[kind] = ones
    return _kept_ones[kind][:, :count]


class Linear(nn.Linear):
    """`torch.nn.Linear`, with faster products or gradients: see the head of this file."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
