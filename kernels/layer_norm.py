"""LayerNorm on CUDA by kernels of our own, which wait for nothing but memory.

PyTorch's kernel gives every row a block, whatever its length: NAT's rows of 64 to 512 channels then take several times
what reading and writing them does. `LayerNorm` is `torch.nn.LayerNorm` whose calls on plain tensors go to
kernels/cuda/layer_norm.py, and to PyTorch's own function everywhere else; `torch.compile` has a kernel as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import calls, direct
from kernels.cuda import layer_norm as cuda
from kernels.cuda import runtime


def layer_norm(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    feeds_linear: bool = False,
) -> Tensor:
    """`torch.nn.functional.layer_norm`. Under autocast it reads `x` as it is, and returns float32 as PyTorch's does.

    feeds_linear: under autocast return its type instead. Where a linear layer alone reads the result, which rounds it
    to that type, the numbers are the same and half as many bytes are written.
    """
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    call = _find(x, normalized_shape, weight, bias, eps, feeds_linear)
    if call is None:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    if call.keeps_statistics:
        output: Tensor = _record(x, weight, bias, call)
        return output
    return call.forward(x, weight, bias)[0]


torch.fx.wrap("layer_norm")  # tracing records the call instead of looking inside


class _Call:
    """A call worked out (see kernels/calls.py), and its backward passes as soon as they are asked for."""

    def __init__(self, norm: cuda.Norm, shape: torch.Size, keeps_statistics: bool) -> None:
        self.keeps_statistics = keeps_statistics
        self._norm = norm
        self._shape = shape
        self.forward = cuda.bind_forward(norm, shape, keeps_statistics)
        self._backward: dict[tuple[bool, bool], cuda.Backward] = {}

    def __call__(self, *tensors: Any) -> Any:
        return self.forward(*tensors)

    def backward(self, needs_weight: bool, needs_bias: bool) -> cuda.Backward:
        found = self._backward.get((needs_weight, needs_bias))
        if found is None:
            found = cuda.bind_backward(self._norm, self._shape, needs_weight, needs_bias)
            self._backward[needs_weight, needs_bias] = found
        return found


def _find(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    feeds_linear: bool,
) -> _Call | None:
    """What serves a call like this; None where PyTorch does. Found behind a guard, if one like it came before."""
    if not (isinstance(x, Tensor) and (x.is_cuda or runtime.installed_runtime(x.device) is not None)):
        return None
    if not direct.is_eager():
        return None
    cast = _cast_type(x, feeds_linear) if _casts() else None
    if weight is None:
        tensors: tuple[Tensor, ...] = (x,)
    else:
        tensors = (x, weight) if bias is None else (x, weight, bias)
    kind = ("layer norm", x.shape, normalized_shape, eps, cast, len(tensors), _records())
    found = direct.find(kind, (), tensors)
    if found is not None:
        served: _Call = found[0]
        return served
    call = _choose(x, normalized_shape, weight, bias, eps, cast)
    if call is not None:
        direct.keep(kind, (), tensors, lambda: call)
    return call


def _cast_type(x: Tensor, feeds_linear: bool) -> torch.dtype | None:
    """The output's type that autocast asks for, if it does."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if feeds_linear else torch.float32


def _choose(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cast: torch.dtype | None,
) -> _Call | None:
    if not _is_plain(x) or x.shape[-1:] != tuple(normalized_shape) or (weight is None and bias is not None):
        return None
    needs_gradient = x.requires_grad
    addresses = x.data_ptr()
    for parameter in (weight, bias):
        if parameter is not None:
            if not _is_plain(parameter) or parameter.device != x.device or parameter.shape != x.shape[-1:]:
                return None
            needs_gradient = needs_gradient or parameter.requires_grad
            addresses |= parameter.data_ptr()
    weight_dtype = x.dtype if weight is None else weight.dtype
    if addresses % calls.ALIGNMENT or (bias is not None and bias.dtype is not weight_dtype):
        return None
    if cast is None and weight_dtype is not x.dtype:  # PyTorch's to refuse
        return None
    channels = x.shape[-1]
    rows = x.numel() // channels if channels else 0
    norm = cuda.Norm(rows, channels, x.dtype, x.dtype if cast is None else cast, weight_dtype, eps, x.device)
    if cuda.why_not(norm) is not None:
        return None
    keeps_statistics = needs_gradient and torch.is_grad_enabled()
    kind = ("layer norm", norm, x.shape, keeps_statistics)
    found = calls.find(kind)
    if found is None:
        found = calls.keep(kind, _Call(norm, x.shape, keeps_statistics))
    assert isinstance(found, _Call)
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether these are contiguous numbers in memory, and no subclass."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


_casts = torch._C._is_any_autocast_enabled
_records = torch.is_grad_enabled


def _readable(tensor: Tensor) -> Tensor:
    is_readable = tensor.is_contiguous() and tensor.data_ptr() % calls.ALIGNMENT == 0
    return tensor if is_readable else tensor.clone(memory_format=torch.contiguous_format)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call) -> Tensor:
        output, statistics = call.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not direct.is_eager():
            gradients = _differentiable(grad_output, x, weight, bias, statistics, needed)
        else:
            backward = ctx.call.backward(*needed[1:])
            gradients = backward(_readable(grad_output), x, weight, statistics)
        return (*(gradient if is_needed else None for gradient, is_needed in zip(gradients, needed, strict=True)), None)


_record = super(torch.autograd.Function, _LayerNorm).apply
"""`_LayerNorm.apply`, without what takes half of its time and is for torch.func, which never gets here."""


def _differentiable(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients by PyTorch's own operator, which knows its derivatives."""
    mean, rstd = statistics.view(2, *x.shape[:-1], 1)
    gradients = torch.ops.aten.native_layer_norm_backward(
        grad_output.float(),
        x.float(),
        x.shape[-1:],
        mean,
        rstd,
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
        needed,
    )
    return [
        gradient if tensor is None or gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, (x, weight, bias), strict=True)
    ]


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, by the faster kernels: see the head of this file, and `layer_norm` for `feeds_linear`."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        feeds_linear: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        self.feeds_linear = feeds_linear

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        # As attributes, these take as long as finding the kernel: nn.Module looks elsewhere first. Where they are not
        # its own, as under a parametrisation, they have to be.
        own: dict[str, Any] = self._parameters
        if "weight" in own and "bias" in own:
            weight, bias = own["weight"], own["bias"]
        else:
            weight, bias = self.weight, self.bias
        return layer_norm(x, self.normalized_shape, weight, bias, self.eps, self.feeds_linear)  # type: ignore[arg-type]
