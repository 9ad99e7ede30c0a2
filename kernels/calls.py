"""Calls worked out once: what every later call of the same kind skips.

The first call of a kind is worked out in full: validated, its backend and kernel family chosen, tiles planned,
arguments packed, the kernel loaded. What comes of it is *bound*: a function of the tensors alone, which allocates the
results, writes addresses over the packed arguments and launches. A later call is looked up by its kind, which holds
everything that any of this may depend on: shapes, strides, types, devices, alignment, options and PyTorch's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.determinism import is_deterministic

ALIGNMENT = 16
"""Bytes: the widest copy that a kernel makes, so the most that it can ask of an address."""

MOST_KINDS = 4096

Kind = tuple[Hashable, ...]
Bound = Callable[..., Any]

_bound: dict[Kind, Bound] = {}

guarded: dict[Kind, list[tuple[Callable[..., bool], tuple[Any, ...], tuple[Any, ...]]]] = {}
"""The same calls as kernels/direct.py finds them: a guard of tensors, options, and what is kept."""


def kind_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    window: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    backend: str | None,
) -> Kind:
    """All that a call's computation depends on, but for the numbers in its tensors and where they lie.

    Flat, and of a length that tells which operands there are: this is most of what a call costs the second time.
    """
    misalignment = (query.data_ptr() | key.data_ptr() | value.data_ptr()) % ALIGNMENT
    kind: Kind = (
        query.shape,
        query.stride(),
        query.dtype,
        query.device,
        key.shape,
        key.stride(),
        key.dtype,
        key.get_device(),
        value.shape,
        value.stride(),
        value.dtype,
        value.get_device(),
        misalignment and tuple(tensor.data_ptr() % ALIGNMENT for tensor in (query, key, value)),
        tuple(window),
        tuple(dilation),
        tuple(stride),
        tuple(is_causal),
        scale,
        backend,
    )
    if rpb is not None:
        kind += (rpb.shape, rpb.stride(), rpb.dtype, rpb.get_device())
    if additional_keys is not None or additional_values is not None:
        kind += (*map(_layout, (additional_keys, additional_values)),)
    if query.dtype is torch.float32:
        kind += (float32_precision(),)
    return kind


def float32_precision() -> str:
    """`torch.backends.cuda.matmul.fp32_precision`, at a quarter of the time."""
    precision: str = torch._C._get_fp32_precision_getter("cuda", "matmul")
    return precision


def _layout(tensor: Tensor | None) -> Kind | None:
    if tensor is None:
        return None
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.data_ptr() % ALIGNMENT)


def backward_kind_of(
    operands: Kind, needs_rpb_grad: bool, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None
) -> Kind:
    """The kind of a backward pass; `operands` is that of its forward pass."""
    return (
        operands,
        output.stride(),
        lse.stride(),
        grad_output.stride(),
        output.data_ptr() % ALIGNMENT,
        grad_output.data_ptr() % ALIGNMENT,
        None if grad_lse is None else (grad_lse.stride(), grad_lse.dtype),
        needs_rpb_grad,
        is_deterministic(),
    )


def find(kind: Kind) -> Bound | None:
    """What was kept for a call of this kind."""
    return _bound.get(kind)


def keep(kind: Kind, bound: Bound) -> Bound:
    """Keeps `bound` for later calls, and returns it. Where shapes never repeat, all are dropped now and then."""
    if len(_bound) >= MOST_KINDS:
        forget()
    _bound[kind] = bound
    return bound


def forget() -> None:
    """Drops all that is kept: there is too much of it, or where kernels run is about to change."""
    _bound.clear()
    guarded.clear()
