"""The `fused` backend: attention weights are never in memory. The fastest kernel family that serves a call computes it.

Families, in order; each may serve the forward pass, the backward pass, or both:
  dense    windows that hold the whole map: PyTorch's own attention
  block    dense dilation groups of few tokens: one fixed bias, no mask
  hopper_strip  small sliding 2-D windows of many maps, on devices of compute capability 9.0 (hopper_ring_backward:
           their gradients; hopper_strip_backward: of wide heads without a bias)
  strip    small sliding 2-D windows
  scalar   small windows in float32, and sequences with windows of a few keys: forward
  hopper   large windows on devices of compute capability 9.0 (hopper_backward: their gradients; hopper_joint: faster,
           where they need not be the same bits every time)
  flash    everything
"""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor

from kernels.backend import BoundBackward, BoundForward, Operands, bind_backward, bind_forward
from kernels.cuda import (
    block,
    dense,
    flash,
    hopper,
    hopper_backward,
    hopper_joint,
    hopper_ring_backward,
    hopper_strip,
    hopper_strip_backward,
    runtime,
    scalar,
    strip,
    strip_backward,
)
from kernels.determinism import is_deterministic
from kernels.problem import Problem

FORWARD: tuple[ModuleType, ...] = (dense, block, hopper_strip, strip, scalar, hopper, flash)
BACKWARD: tuple[ModuleType, ...] = (
    block,
    hopper_strip_backward,
    hopper_ring_backward,
    strip_backward,
    hopper_joint,
    hopper_backward,
    flash,
)
NONDETERMINISTIC: frozenset[ModuleType] = frozenset({hopper_joint})


class Fused:
    """Backend of the fused kernels."""

    name = "fused"

    def why_not(self, problem: Problem) -> str | None:
        return runtime.why_not_here(problem) or flash.why_not(problem)

    def repeats(self, problem: Problem) -> bool:
        """Whether gradients are the same bits every time, as things are set."""
        return backward_families(problem, is_deterministic())[0] not in NONDETERMINISTIC

    def bind_forward(self, problem: Problem, operands: Operands) -> BoundForward:
        for family in forward_families(problem):
            if _takes(family, problem, operands):
                return bind_forward(family, problem, operands)
        raise AssertionError("flash takes any strides")

    def bind_backward(
        self,
        problem: Problem,
        operands: Operands,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        needs_rpb_grad: bool,
    ) -> BoundBackward:
        for family in backward_families(problem, is_deterministic()):
            why_not_gradient = getattr(family, "why_not_gradient", None)
            if why_not_gradient is None or why_not_gradient(operands, grad_output) is None:
                return bind_backward(family, problem, operands, output, lse, grad_output, grad_lse, needs_rpb_grad)
        raise AssertionError("flash takes any strides")


def _takes(family: ModuleType, problem: Problem, operands: Operands) -> bool:
    """Whether the addresses and strides suit the family, where it has wishes about them."""
    why_not_operands = getattr(family, "why_not_operands", None)
    return why_not_operands is None or why_not_operands(problem, operands) is None


@functools.lru_cache(maxsize=1024)
def forward_families(problem: Problem) -> tuple[ModuleType, ...]:
    """The families that serve the forward pass, best first."""
    return tuple(family for family in FORWARD if family.why_not(problem) is None)


@functools.lru_cache(maxsize=1024)
def backward_families(problem: Problem, deterministic: bool) -> tuple[ModuleType, ...]:
    """The families that serve the backward pass, best first."""
    allowed = (family for family in BACKWARD if not (deterministic and family in NONDETERMINISTIC))
    return tuple(family for family in allowed if family.why_not(problem) is None)


BACKEND = Fused()
