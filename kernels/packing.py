"""Query, key and value as slices of one tensor, the product of one linear layer; and their gradients likewise.

The gradient of `unbind` copies three tensors into one: 6 % of a training step of nat_tiny on an H100. Where kernels
leave the three as slices of one tensor (see kernels/cuda/bound.py), that tensor is the gradient, and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import direct


def unbind(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[..., heads, head_dim]`, views of `packed` `[..., 3, heads, head_dim]`."""
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        query, key, value = packed.unbind(-3)
        return query, key, value
    return _unbind(packed)


torch.fx.wrap("unbind")  # tracing records the call instead of looking inside


def _unbind(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if packed.requires_grad and torch.is_grad_enabled() and type(packed) is Tensor and direct.is_eager():
        slices: tuple[Tensor, Tensor, Tensor] = _Unbind.apply(packed)
        return slices
    query, key, value = packed.unbind(-3)
    return query, key, value


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(-3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        query, key, value = gradients
        if torch.is_grad_enabled() or not are_slices(query, key, value):
            return torch.stack(gradients, -3)
        *lead, heads, head_dim = query.shape
        strides = (*query.stride()[:-2], heads * head_dim, *query.stride()[-2:])
        return query.as_strided((*lead, 3, heads, head_dim), strides)


def are_slices(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the three are one after another the slices along the third last dimension of a contiguous tensor."""
    heads, head_dim = query.shape[-2:]
    strides, step = [1, head_dim], 3 * heads * head_dim
    for size in reversed(query.shape[:-2]):
        strides.append(step)
        step *= size
    first, distance = query.storage_offset(), heads * head_dim
    return (
        query.shape == key.shape == value.shape
        and query.stride() == key.stride() == value.stride() == tuple(reversed(strides))
        and key.storage_offset() == first + distance
        and value.storage_offset() == first + 2 * distance
        and query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        and query.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    )
