"""The operators fastna::forward and fastna::backward, as PyTorch knows them: fakes, gradients, autocast.

`Library.define` and `impl` instead of `torch.library.custom_op`: they cost a few microseconds less per call, and the
smallest CUDA kernels take ten. Nothing here computes; `dispatch` says who does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels import calls, direct
from kernels.backend import Gradients, Operands, bind_backward, bind_forward
from kernels.determinism import is_deterministic
from kernels.dispatch import choose
from kernels.packing import are_slices
from kernels.validation import check, describe

_Key = torch._C.DispatchKey

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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    given: direct.Given,
    validated: Callable[..., tuple[Any, ...]],
) -> Any:
    """Output and lse, without PyTorch's dispatcher where nobody would notice (see kernels/direct.py).

    Args:
        given: all that the result depends on besides the tensors, as the caller gave it.
        validated: of the tensors and `given`: what `forward` takes. Not asked where a call like this was valid before.
    """
    tensors = query, key, value, rpb, additional_keys, additional_values
    if direct.is_listened_to() or not isinstance(query, Tensor):
        return forward(*validated(*tensors, *given))
    present: tuple[Any, ...] = (query, key, value) if rpb is None else (query, key, value, rpb)
    if additional_keys is not None and additional_values is not None:
        present = (*present, additional_keys, additional_values)
    precision = calls.float32_precision() if query.dtype is torch.float32 else None
    kind = (query.shape, given, rpb is None, additional_keys is None, additional_values is None, precision)
    found = direct.find(kind, given, present)
    if found is None:
        inputs = validated(*tensors, *given)
        result = forward(*inputs)
        requires_grad = any(tensor.requires_grad for tensor in present)
        direct.keep(kind, given, present, lambda: calls.find(calls.kind_of(*inputs)), requires_grad, inputs[6:])
        return result
    bound, requires_grad, options = found
    if requires_grad and torch.is_grad_enabled():
        return _Attention.apply(*tensors, bound, options)
    return bound(*tensors)


def _gradients(*inputs: Any) -> tuple[Tensor | None, ...]:
    """What `backward` does, in the same way; None for what is no gradient."""
    if torch.is_grad_enabled() or direct.is_listened_to():
        return backward(*inputs)
    tensors, given = inputs[:10], inputs[10:]
    present = [tensor for tensor in tensors if tensor is not None]
    absent = tuple([tensor is None for tensor in tensors])
    kind = (tensors[0].shape, given, absent, is_deterministic(), calls.float32_precision())
    found = direct.find(kind, given, present)
    if found is None:
        result = backward(*inputs)
        direct.keep(kind, given, present, lambda: _packing(calls.find(_backward_kind(*inputs)), *tensors[:3]))
        return result
    (bound,) = found
    return bound(*tensors).tensors


def _packing(bound: calls.Bound | None, query: Tensor, key: Tensor, value: Tensor) -> calls.Bound | None:
    """`bound`, or what it offers for slices of one tensor: then their gradients are so too (kernels/packing.py).

    For calls past the dispatcher alone: an operator's results may not share memory.
    """
    offer = getattr(bound, "packed", None)
    return offer() if offer is not None and are_slices(query, key, value) else bound


def _readable(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if its last dimension is not contiguous: backends read rows."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _all_readable(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else _readable(tensor) for tensor in tensors]


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    kind = calls.kind_of(*inputs)
    bound = calls.find(kind)
    if bound is None:
        bound = calls.keep(kind, _bind_forward(inputs[:6], inputs[6:]))
    result: tuple[Tensor, Tensor] = bound(*inputs[:6])
    return result


def _bind_forward(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> calls.Bound:
    *window_options, backend = options
    problem = describe(*tensors, *window_options)
    chosen = choose(problem, backend)
    if problem.batch == 0:
        return lambda query, *others: (
            query.new_empty((*query.shape[:-1], problem.value_dim)),
            query.new_empty(query.shape[:-1], dtype=problem.accumulation_dtype),
        )
    readable = _all_readable(tensors)
    bound = bind_forward(chosen, problem, Operands(*readable))  # type: ignore[arg-type]
    if all(one is other for one, other in zip(tensors, readable, strict=True)):
        return bound
    return lambda *tensors: bound(*_all_readable(tensors))


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    kind = _backward_kind(*inputs)
    bound = calls.find(kind)
    if bound is None:
        bound = calls.keep(kind, _bind_backward(inputs[:6], inputs[6:10], inputs[10], inputs[11:]))
    gradients: Gradients = bound(*inputs[:10])
    return tuple(_absent(inputs[0]) if gradient is None else gradient for gradient in gradients.tensors)


def _backward_kind(*inputs: Any) -> calls.Kind:
    return calls.backward_kind_of(calls.kind_of(*inputs[:6], *inputs[11:]), inputs[10], *inputs[6:10])


def _bind_backward(
    operands: tuple[Any, ...], others: tuple[Any, ...], needs_rpb_grad: bool, options: tuple[Any, ...]
) -> calls.Bound:
    *window_options, backend = options
    problem = describe(*operands, *window_options)
    chosen = choose(problem, backend)
    if problem.batch == 0:
        return lambda query, key, value, rpb, *others: Gradients(
            torch.zeros_like(query),
            torch.zeros_like(key),
            torch.zeros_like(value),
            torch.zeros_like(rpb) if needs_rpb_grad else None,
            *(None if tensor is None else torch.zeros_like(tensor) for tensor in others[:2]),
        )
    tensors = (*operands, *others)
    readable: list[Any] = [*_all_readable(operands), *_with_readable_gradient(*others)]
    output, lse, grad_output, grad_lse = readable[6:]
    bound = bind_backward(chosen, problem, Operands(*readable[:6]), output, lse, grad_output, grad_lse, needs_rpb_grad)
    if all(one is other for one, other in zip(tensors, readable, strict=True)):
        return bound
    return lambda *tensors: bound(*_all_readable(tensors[:6]), *_with_readable_gradient(*tensors[6:]))


def _with_readable_gradient(
    output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    return output, lse, _readable(grad_output), grad_lse


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


_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_BELOW_AUTOGRAD_BITS = _BELOW_AUTOGRAD.raw_repr()
_PLAIN = frozenset(torch._C.DispatchKeySet(key).raw_repr() for key in (_Key.CPU, _Key.CUDA))


def _below_autograd(
    op: torch._ops.OpOverload, compute: Callable[..., Any], keys: torch._C.DispatchKeySet, inputs: tuple[Any, ...]
) -> Any:
    """What `op` does once autograd has had its say: `compute` itself for plain tensors, which saves a second dispatch.

    Fakes, traced and wrapped tensors, and active modes have further keys, and take the long way.
    """
    if keys.raw_repr() & _BELOW_AUTOGRAD_BITS in _PLAIN:
        return compute(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & _BELOW_AUTOGRAD, *inputs)


class _Attention(torch.autograd.Function):
    """The forward operator in a graph. `torch.library.register_autograd` would do, at 10 us more for each call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *operands, compute, arguments = inputs
        output: tuple[Tensor, Tensor] = compute(*operands)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *output)
        ctx.arguments = arguments
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        grad_output, grad_lse = gradients
        *operands, output, lse = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        needed = ctx.needs_input_grad
        needs_rpb_grad = operands[3] is not None and needed[3]
        found = _gradients(*operands, output, lse, grad_output, grad_lse, needs_rpb_grad, *ctx.arguments)
        return (*(g if needed[i] else None for i, g in enumerate(found)), None, None)


class _Gradient(torch.autograd.Function):
    """The backward operator in a graph: it can be part of one, but not be differentiated."""

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *inputs: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _below_autograd(backward, _backward, keys, inputs)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(
            "neighborhood attention has no second derivative; differentiate once, without create_graph=True"
        )


def _refuse_forward_mode(tensors: Sequence[Tensor | None]) -> None:
    """Without this a tangent would be dropped, which reads as a derivative of zero."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "neighborhood attention has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); "
            "differentiate in reverse mode, by backward() or torch.autograd.grad"
        )


def _forward_autograd(keys: torch._C.DispatchKeySet, *inputs: Any) -> Any:
    if forward_ad._current_level >= 0:
        _refuse_forward_mode(inputs[:6])
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs[:6]):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "neighborhood attention is not differentiated by torch.func (grad, vjp, jacrev): use backward() or "
                "torch.autograd.grad, or kernels.decomposed(), under which it is made of PyTorch's own functions"
            )
        *windows, scale, backend = inputs[6:]
        options = (*map(tuple, windows), scale, backend)  # the dispatcher makes lists, which are no part of a kind
        return _Attention.apply(
            *inputs[:6], lambda *tensors: _below_autograd(forward, _forward, keys, (*tensors, *options)), options
        )
    return _below_autograd(forward, _forward, keys, inputs)


def _backward_autograd(keys: torch._C.DispatchKeySet, *inputs: Any) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs[:10]):
        return _Gradient.apply(keys, *inputs)
    return _below_autograd(backward, _backward, keys, inputs)


def _autocast(device: str) -> None:
    """Under autocast on `device`, all operands but rpb are cast: rpb, a parameter, keeps its own precision."""
    autocast_key, autograd_key = (getattr(_Key, f"{kind}{device.upper()}") for kind in ("Autocast", "Autograd"))
    autocast_keys = torch._C.DispatchKeySet(autocast_key)
    below = torch._C._dispatch_keyset_full_after(autocast_key)
    plain = (torch._C.DispatchKeySet(autograd_key) | torch._C.DispatchKeySet(getattr(_Key, device.upper()))).raw_repr()

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None or tensor.dtype is dtype or tensor.dtype is torch.float64 or not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype)

    def forward_autocast(keys: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        query, key, value, rpb, additional_keys, additional_values = inputs[:6]
        operands = cast(query, dtype), cast(key, dtype), cast(value, dtype), rpb
        additional = cast(additional_keys, dtype), cast(additional_values, dtype)
        keys = keys & below
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            if keys.raw_repr() == plain:  # as in `_below_autograd`: nothing but autograd comes next
                return _forward_autograd(keys, *operands, *additional, *inputs[6:])
            return forward(*operands, *additional, *inputs[6:])

    _library.impl("forward", forward_autocast, f"Autocast{device.upper()}", with_keyset=True)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("backward", _backward_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("fastna::forward", _forward_fake, lib=_library)
torch.library.register_fake("fastna::backward", _backward_fake, lib=_library)
for _device in ("cpu", "cuda"):
    _autocast(_device)
