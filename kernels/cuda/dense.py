"""Kernel family `dense`: a window that holds the whole map is plain attention, and PyTorch has kernels for that.

Forward only: cuDNN's fused attention from compute capability 9.0, FlashAttention 2 below. Their lse is all that the
gradients need, which are the other families', for PyTorch's add up in any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.backend import BoundForward, Operands
from kernels.cuda import runtime
from kernels.problem import Problem

FEWEST_TOKENS = 512
"""Below, a map is little work, and the kernels of this project start sooner. Not measured."""

LARGEST_HEAD_DIM = 128


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve the forward pass, in one sentence; None where it does."""
    if problem.device.type != "cuda":
        return f"dense asks PyTorch's CUDA kernels; the tensors are on {problem.device}"
    if not problem.is_dense or max(problem.dilation) > 1:
        return "dense takes windows that hold the whole map, without dilation or causality"
    if problem.tokens < FEWEST_TOKENS:
        return f"dense takes maps of at least {FEWEST_TOKENS} tokens; this has {problem.tokens}"
    if problem.has_rpb or problem.additional:
        return "dense knows no bias and no additional keys"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"dense computes in float16 and bfloat16; this is {problem.dtype}"
    if problem.head_dim != problem.value_dim or problem.head_dim % 8 or problem.head_dim > LARGEST_HEAD_DIM:
        return (
            f"dense takes one head_dim, a multiple of 8 up to {LARGEST_HEAD_DIM}; "
            f"these are {problem.head_dim}, {problem.value_dim}"
        )
    if problem.key_heads != problem.heads:
        return f"dense needs as many key heads as heads; these are {problem.key_heads}, {problem.heads}"
    if not 0 < problem.scale < math.inf:
        return f"dense takes a positive scale, not {problem.scale}"
    return None


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why these tensors do not suit, in a few words; None where they do: tokens at one distance, 16-byte alignment."""
    for name in ("query", "key", "value"):
        tensor: Tensor = getattr(operands, name)
        if tensor.data_ptr() % 16 or any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1]):
            return f"{name} is not aligned to 16 bytes"
        inner = zip(tensor.stride()[1:-2], tensor.stride()[2:-2], tensor.shape[2:-2], strict=False)
        if any(outer != step * size for outer, step, size in inner):
            return f"{name} has tokens that are not all at one distance"
    return None


def bind_forward(problem: Problem, operands: Operands) -> BoundForward:
    """The forward pass of a problem and operands that `why_not` and `why_not_operands` accept."""
    shape = (problem.batch, *problem.space, problem.heads)
    flat = (problem.batch, problem.tokens, problem.heads, problem.head_dim)

    def run(query: Tensor, key: Tensor, value: Tensor, *absent: None) -> tuple[Tensor, Tensor]:
        query, key, value = (tensor.view(flat).transpose(1, 2) for tensor in (query, key, value))
        output, lse = attend(query, key, value, problem.scale)
        lse = lse.reshape(problem.batch, problem.heads, problem.tokens)
        output, lse = (tensor.transpose(1, 2).contiguous() for tensor in (output, lse))
        return output.view(*shape, problem.value_dim), lse.view(shape)

    return run


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `[batch, heads, tokens, head_dim]`, and its lse `[batch, heads, tokens]`; cuDNN adds a 1 to that."""
    if runtime.properties(query.device).capability >= (9, 0) and torch.backends.cudnn.is_available():
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    output, lse = found[:2]
    return output, lse
