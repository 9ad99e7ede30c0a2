"""What a backend is: one way to compute a `Problem`, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.problem import Problem


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of a call, shaped and typed as its `Problem` says, with any strides that keep the last dimension
    contiguous.

    Additional keys and values come together or not at all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of the operands, contiguous and in the operands' dtypes; None where there is none."""

    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None = None
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None


class Backend(Protocol):
    """One way to compute neighborhood attention. A batch is never empty here: the operator answers that itself."""

    @property
    def name(self) -> str: ...

    def why_not(self, problem: Problem) -> str | None:
        """One sentence on why this backend does not serve `problem`; None if it does."""
        ...

    def forward(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
        """Output and lse (natural logarithm), both new and contiguous."""
        ...

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        needs_rpb_grad: bool,
    ) -> Gradients:
        """Gradients of all operands; that of rpb, accumulated in float32 at least, only if `needs_rpb_grad`.

        `grad_output` has a contiguous last dimension, `grad_lse` is None where nothing depends on lse. With p = exp(s
        - lse), dp = grad_output value^T and delta = sum(grad_output * output, -1) - grad_lse: ds = p * (dp - delta).
        """
        ...
