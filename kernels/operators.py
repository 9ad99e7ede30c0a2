"""The operators fastna::forward and fastna::backward, as PyTorch knows them: fakes, gradients, autocast.

`Library.define` and `impl` instead of `torch.library.custom_op`: they cost a few microseconds less per call, and the
smallest CUDA kernels take ten. Nothing here computes; `dispatch` says who does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Operands
from kernels.dispatch import choose
from kernels.validation import check, describe

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values"
_ARGUMENTS = "int[] window, int[] dilation, int[] stride, bool[] is_causal, float scale, str? backend"

_library = torch.library.Library("fastna", "DEF")
_library.define(f"forward({_OPERANDS}, {_ARGUMENTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"backward({_OPERANDS}, Tensor output, Tensor lse, Tensor grad_output, Tensor? grad_lse, bool needs_rpb_grad, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
forward = torch.ops.fastna.forward.default
backward = torch.ops.fastna.backward.default


def _readable(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if its last dimension is not contiguous: backends read rows."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _maybe_readable(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _readable(tensor)


def _operands(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, keys: Tensor | None, values: Tensor | None
) -> Operands:
    return Operands(
        _readable(query),
        _readable(key),
        _readable(value),
        _maybe_readable(rpb),
        _maybe_readable(keys),
        _maybe_readable(values),
    )


def _forward(
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
) -> tuple[Tensor, Tensor]:
    problem = describe(
        query, key, value, rpb, additional_keys, additional_values, window, dilation, stride, is_causal, scale
    )
    chosen = choose(problem, backend)
    if problem.batch == 0:
        shape = query.shape[:-1]
        return query.new_empty((*shape, problem.value_dim)), query.new_empty(shape, dtype=problem.accumulation_dtype)
    return chosen.forward(problem, _operands(query, key, value, rpb, additional_keys, additional_values))


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
    window: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    backend: str | None,
) -> tuple[Tensor, ...]:
    problem = describe(
        query, key, value, rpb, additional_keys, additional_values, window, dilation, stride, is_causal, scale
    )
    tensors = (query, key, value, rpb if needs_rpb_grad else None, additional_keys, additional_values)
    if problem.batch == 0:
        return tuple(_absent(query) if t is None else t.new_zeros(t.shape) for t in tensors)
    gradients = choose(problem, backend).backward(
        problem,
        _operands(query, key, value, rpb, additional_keys, additional_values),
        output,
        lse,
        _readable(grad_output),
        grad_lse,
        needs_rpb_grad,
    )
    return (
        gradients.query,
        gradients.key,
        gradients.value,
        _absent(query) if gradients.rpb is None else gradients.rpb,
        _absent(query) if gradients.additional_keys is None else gradients.additional_keys,
        _absent(query) if gradients.additional_values is None else gradients.additional_values,
    )


def _absent(like: Tensor) -> Tensor:
    """What stands for a gradient that does not exist: an operator's schema cannot return an optional tensor."""
    return like.new_empty(0)


def _forward_fake(
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
) -> tuple[Tensor, Tensor]:
    check(query, key, value, rpb, additional_keys, additional_values, window, dilation, stride, is_causal, scale)
    shape = query.shape[:-1]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*shape, value.shape[-1])), query.new_empty(shape, dtype=lse_dtype)


def _backward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    tensors = (query, key, value, rpb if needs_rpb_grad else None, additional_keys, additional_values)
    return tuple(_absent(query) if t is None else t.new_empty(t.shape) for t in tensors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.arguments = inputs[6:]


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *operands, output, lse = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needed = ctx.needs_input_grad
    needs_rpb_grad = operands[3] is not None and needed[3]
    gradients = backward(*operands, output, lse, grad_output, grad_lse, needs_rpb_grad, *ctx.arguments)
    return (*(g if needed[i] else None for i, g in enumerate(gradients)), *(None for _ in ctx.arguments))


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("neighborhood attention has no second derivative; differentiate once, without create_graph=True")


def _autocast(device: str) -> None:
    """Under autocast on `device`, all operands but rpb are cast: rpb, a parameter, keeps its own precision."""
    key_set = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if tensor is not None and eligible else tensor

    def forward_autocast(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        *arguments: Any,
    ) -> Any:
        dtype = torch.get_autocast_dtype(device)
        query_, key_, value_ = cast(query, dtype), cast(key, dtype), cast(value, dtype)
        keys_, values_ = cast(additional_keys, dtype), cast(additional_values, dtype)
        with torch._C._ExcludeDispatchKeyGuard(key_set):
            return forward(query_, key_, value_, rpb, keys_, values_, *arguments)

    _library.impl("forward", forward_autocast, f"Autocast{device.upper()}")


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastna::forward", _forward_fake, lib=_library)
torch.library.register_fake("fastna::backward", _backward_fake, lib=_library)
torch.library.register_autograd("fastna::forward", _differentiate, setup_context=_keep, lib=_library)
torch.library.register_autograd("fastna::backward", _refuse, lib=_library)
for _device in ("cpu", "cuda"):
    _autocast(_device)
