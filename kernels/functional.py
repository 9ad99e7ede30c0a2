"""The functions users call. `kernels/__init__.py` names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import operators
from kernels.dispatch import Explanation, explain_problem, require_known
from kernels.validation import (
    BoolPerAxis,
    IntPerAxis,
    bools_per_axis,
    describe,
    ints_per_axis,
    rank_of,
    require_tensors,
    scale_of,
)


def _validated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rank: int | None,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    stride: IntPerAxis,
    is_causal: BoolPerAxis,
    scale: float | None,
    backend: str | None,
) -> tuple[Any, ...]:
    """The call as `operators.forward` takes it; an error that names what is wrong with it."""
    if backend is not None:
        require_known(backend)
    rank = rank_of(query, rank)
    tensors = query, key, value, rpb, additional_keys, additional_values
    require_tensors(*tensors)
    return (
        *tensors,
        ints_per_axis("kernel_size", kernel_size, rank),
        ints_per_axis("dilation", dilation, rank),
        ints_per_axis("stride", stride, rank),
        bools_per_axis("is_causal", is_causal, rank),
        scale_of(scale, query),
        backend,
    )


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    *,
    dilation: IntPerAxis = 1,
    stride: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Every query attends to the `kernel_size` keys around it, over a space of one, two or three axes.

    *Neighborhood Attention Transformer* (arXiv 2204.07143, section 3.1); dilation as in *Dilated Neighborhood Attention
    Transformer* (arXiv 2209.15001, section 3.1); stride as in *Generalized Neighborhood Attention* (arXiv 2504.16922).
    A window is pushed inward at a border, so every query has equally many keys; a causal one is cut on the left.

    Args:
        query: `[batch, *space, heads, head_dim]`, float16, bfloat16, float32 or float64. Any strides; a tensor whose
            last dimension is not contiguous is copied first.
        key: `[batch, *space, key_heads, head_dim]`; `key_heads` divides `heads`, query head h reads key head
            `h // (heads // key_heads)`.
        value: `[batch, *space, key_heads, value_dim]`.
        kernel_size: keys per axis; `kernel_size * dilation` may not exceed the axis. As the next three, one for all
            axes or one per axis.
        dilation: tokens from one key to the next.
        stride: queries that share one window; 1 slides, `kernel_size` makes blocks.
        is_causal: whether keys behind the query are hidden.
        rpb: relative positional bias `[heads, 2 * kernel_size - 1, ...]`, added to the scaled score of query i and key
            j at index `j - i + kernel_size - 1`, counted in steps of the dilation. Of the query's dtype, or float32
            for float16 and bfloat16.
        scale: of the scores; None for `head_dim ** -0.5`.
        additional_keys: `[batch, n, key_heads, head_dim]`, seen by every query besides its window, without bias.
        additional_values: `[batch, n, key_heads, value_dim]`.
        return_lse: also return the logsumexp of each query's scores (see `merge_attentions`). Differentiable.
        backend: one of fused, gemm, naive, native, tiled, reference; None for the fastest that serves (see `explain`).

    Returns:
        `[batch, *space, heads, value_dim]` in the query's dtype; with `return_lse` also lse `[batch, *space, heads]`,
        natural logarithm, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: before anything is computed, naming the argument, its value, the rule and the fix.
    """
    options = None, kernel_size, dilation, stride, is_causal, scale, backend
    results = operators.attend(query, key, value, rpb, additional_keys, additional_values, options, _validated)
    return results if return_lse else results[0]


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    *,
    dilation: IntPerAxis = 1,
    stride: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`neighborhood_attention` over sequences: query `[batch, length, heads, head_dim]`."""
    options = 1, kernel_size, dilation, stride, is_causal, scale, backend
    results = operators.attend(query, key, value, rpb, additional_keys, additional_values, options, _validated)
    return results if return_lse else results[0]


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    *,
    dilation: IntPerAxis = 1,
    stride: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`neighborhood_attention` over maps: query `[batch, height, width, heads, head_dim]`."""
    options = 2, kernel_size, dilation, stride, is_causal, scale, backend
    results = operators.attend(query, key, value, rpb, additional_keys, additional_values, options, _validated)
    return results if return_lse else results[0]


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    *,
    dilation: IntPerAxis = 1,
    stride: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`neighborhood_attention` over volumes: query `[batch, depth, height, width, heads, head_dim]`."""
    options = 3, kernel_size, dilation, stride, is_causal, scale, backend
    results = operators.attend(query, key, value, rpb, additional_keys, additional_values, options, _validated)
    return results if return_lse else results[0]


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    *,
    dilation: IntPerAxis = 1,
    stride: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend would serve `neighborhood_attention` of the same arguments, and why no other; print it."""
    tensors = query, key, value, rpb, additional_keys, additional_values
    *call, _ = _validated(*tensors, None, kernel_size, dilation, stride, is_causal, scale, backend)
    return explain_problem(describe(*call), backend)


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the attention over each. Differentiable.

    Args:
        outputs: of each set, `[..., heads, value_dim]`, all of one shape.
        lses: of each set, `[..., heads]`, natural logarithm, as `return_lse=True` gives them.

    Returns:
        The merged output, in the dtype of the first, and the merged lse: `lse = log(sum exp(lse_i))`,
        `output = sum exp(lse_i - lse) * output_i`.
    """
    for name, tensors in (("outputs", outputs), ("lses", lses)):
        if not isinstance(tensors, Sequence):
            raise TypeError(f"{name} must be a sequence of Tensors, one per set of keys, not {type(tensors).__name__}")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] must be a Tensor, not {type(tensor).__name__}")
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"outputs has {len(outputs)} tensors, lses has {len(lses)}; give one lse per output, and at least one"
        )
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != outputs[0].shape:
            raise ValueError(
                f"outputs[{i}] has shape {tuple(output.shape)}, outputs[0] has {tuple(outputs[0].shape)}; they must "
                f"be equal"
            )
        if lse.shape != output.shape[:-1]:
            raise ValueError(
                f"lses[{i}] has shape {tuple(lse.shape)}; it must be that of outputs[{i}] less the last axis, "
                f"{tuple(output.shape[:-1])}"
            )
    stacked = torch.stack(tuple(lses))
    merged = stacked.logsumexp(0)
    # A query without any key has lse = -inf in every set; the clamp makes its weights 0 instead of NaN.
    weights = (stacked - merged.clamp(min=torch.finfo(merged.dtype).min)).exp()
    total = sum(weight[..., None] * output for weight, output in zip(weights, outputs, strict=True))
    return torch.as_tensor(total).to(outputs[0].dtype), merged
