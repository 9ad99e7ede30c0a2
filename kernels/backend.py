"""What a backend is: one way to compute a `Problem`, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kernels.problem import Problem


@dataclass(frozen=True, slots=True)
class _PerOperand:
    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All six, in the order of the fields."""
        return self.query, self.key, self.value, self.rpb, self.additional_keys, self.additional_values


class Operands(_PerOperand):
    """The tensors of a call, shaped and typed as its `Problem` says, with any strides that keep the last dimension
    contiguous.

    Additional keys and values come together or not at all.
    """

    __slots__ = ()


class Gradients(_PerOperand):
    """Gradients of the operands, contiguous and in the operands' dtypes; None where there is none."""

    __slots__ = ()


class Backend(Protocol):
    """One way to compute neighborhood attention. A batch is never empty here: the operator answers that itself.

    Besides what stands here it has `forward` or `bind_forward`, and `backward` or `bind_backward`, in the forms that
    `reference` and `fused` have them. So has a kernel family. The functions below do with either.
    """

    @property
    def name(self) -> str: ...

    def why_not(self, problem: Problem) -> str | None:
        """One sentence on why this backend does not serve `problem`; None if it does."""
        ...


BoundForward = Callable[..., tuple[Tensor, Tensor]]
"""Of query, key, value, rpb, additional keys and values: output and lse."""

BoundBackward = Callable[..., Gradients]
"""Of the same six, output, lse, grad_output and grad_lse: the gradients."""


def bind_forward(served_by: Any, problem: Problem, operands: Operands) -> BoundForward:
    """The forward pass of every call of the same kind (see kernels/calls.py), as a function of its tensors.

    `served_by`, a backend or a kernel family, may have a `bind_forward(problem, operands)` of its own, which does now
    what depends on no address. Whatever its function is given later has the strides and alignment of `operands`.
    """
    if hasattr(served_by, "bind_forward"):
        bound: BoundForward = served_by.bind_forward(problem, operands)
        return bound
    return lambda *tensors: served_by.forward(problem, Operands(*tensors))


def bind_backward(
    served_by: Any,
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> BoundBackward:
    """As `bind_forward`, for the backward pass. `needs_rpb_grad` counts only where there is an rpb."""
    needs_rpb_grad = needs_rpb_grad and operands.rpb is not None
    if hasattr(served_by, "bind_backward"):
        bound: BoundBackward = served_by.bind_backward(
            problem, operands, output, lse, grad_output, grad_lse, needs_rpb_grad
        )
        return bound
    return lambda *tensors: served_by.backward(problem, Operands(*tensors[:6]), *tensors[6:], needs_rpb_grad)


def forward(served_by: Any, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """Output and lse (natural logarithm), both new and contiguous."""
    return bind_forward(served_by, problem, operands)(*operands.tensors)


def backward(
    served_by: Any,
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> Gradients:
    """Gradients of all operands; that of rpb, accumulated in float32 at least, only if `needs_rpb_grad`.

    `grad_output` has a contiguous last dimension, `grad_lse` is None where nothing depends on lse. With p = exp(s -
    lse), dp = grad_output value^T and delta = sum(grad_output * output, -1) - grad_lse: ds = p * (dp - delta).
    """
    others = (output, lse, grad_output, grad_lse)
    return bind_backward(served_by, problem, operands, *others, needs_rpb_grad)(*operands.tensors, *others)
