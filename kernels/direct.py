"""Calls that go straight to what computes them, past PyTorch's dispatcher, where that would only hand the tensors on.

To dispatch to a kernel in Python costs the host more than all else that a small call does. It is needed where anything
listens on the way: modes, subclasses, tracers, autocast, torch.func, a profiler. Most of that shows in dispatch keys,
the tensors' and the thread's. So the first call of a kind goes by the dispatcher, and if no key asked for more than
autograd, what it came to is kept behind a guard: one call of C++, made for `torch.compile`, which compares types,
dispatch keys, dtypes, devices, `requires_grad`, sizes and strides.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

from kernels import calls

MOST_GUARDS = 8
"""Of one kind: tried one after another, so the oldest goes."""

_Key = torch._C.DispatchKey
_NOTHING_BUT_AUTOGRAD = torch._C.DispatchKeySet(_Key.BackendSelect) | torch._C.DispatchKeySet(_Key.ADInplaceOrView)
# Autocast's keys are no reason either: who keeps a call under autocast makes it part of the kind.
for _key in (_Key.CPU, _Key.CUDA, _Key.AutogradCPU, _Key.AutogradCUDA, _Key.AutocastCPU, _Key.AutocastCUDA):
    _NOTHING_BUT_AUTOGRAD = _NOTHING_BUT_AUTOGRAD | torch._C.DispatchKeySet(_key)
_TYPES = (Tensor, torch.nn.Parameter)

Given = tuple[Any, ...]
"""Options as the caller gave them, before anything is made of them."""

_in_function_mode = torch._C._is_torch_function_mode_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_profiling = torch._C._autograd._profiler_enabled
_casts = torch._C._is_any_autocast_enabled


def is_listened_to() -> bool:
    """Whether something wants to see the operator that no guard notices; or that is too common to find out by one."""
    return (
        torch.compiler.is_compiling()
        or _in_function_mode()
        or _dispatch_modes() > 0
        or _is_profiling()
        or _casts()
        or forward_ad._current_level >= 0
    )


def is_eager() -> bool:
    """Whether a call does what it says and nobody listens: no tracing, mode or transform. Autocast may be on."""
    return not (
        torch._C._is_tracing()
        or _in_function_mode()
        or _dispatch_modes() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def find(kind: calls.Kind, given: Given, tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """What `keep` kept for this kind, options and tensors like these; None if nothing.

    `kind` holds what the call depends on besides the guarded tensors, `given` among it, and enough of them to tell most
    calls apart.
    """
    try:
        entries = calls.guarded.get(kind, ())
    except TypeError:  # a list among the options
        return None
    for matches, options, kept in entries:
        if matches(*tensors) and (
            options is given or all(map(operator.is_, options, given)) or _are_alike(options, given)
        ):
            addresses = 0
            for tensor in tensors:
                addresses |= tensor.data_ptr()
            return None if addresses % calls.ALIGNMENT else kept
    return None


def keep(
    kind: calls.Kind, given: Given, tensors: Sequence[Tensor], bound: Callable[[], calls.Bound | None], *more: object
) -> None:
    """Keeps what a call just dispatched came to, if the dispatcher had nothing to do but to find autograd.

    That is `bound()`, if there is any, and `more`.
    """
    if not _are_plain(tensors) or any(tensor.data_ptr() % calls.ALIGNMENT for tensor in tensors):
        return
    found = bound()
    if found is None:
        return
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],  # type: ignore[misc]
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],  # type: ignore[misc]
    )
    with contextlib.suppress(TypeError):  # a list among the options
        entries = calls.guarded.setdefault(kind, [])
        entries.append((guards.check, given, (found, *more)))
        del entries[:-MOST_GUARDS]


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    keys = torch._C._dispatch_tls_local_include_set()
    for tensor in tensors:
        keys = keys | torch._C._dispatch_keys(tensor)
    keys = keys - torch._C._dispatch_tls_local_exclude_set()
    has_more = (keys | _NOTHING_BUT_AUTOGRAD).raw_repr() != _NOTHING_BUT_AUTOGRAD.raw_repr()
    return not has_more and all(type(tensor) in _TYPES for tensor in tensors)


def _are_alike(options: Given, others: Given) -> bool:
    """Whether equal options are of the same types: 7 is a window, 7.0 and True are none."""
    return all(
        type(one) is type(other) and (type(one) is not tuple or [*map(type, one)] == [*map(type, other)])
        for one, other in zip(options, others, strict=True)
    )
