"""The attention layers of the published models as problems: what kernel families name their kernels to compile by."""

from __future__ import annotations

import torch

from kernels.problem import Axis, Problem


def nat_layer(length: int, dtype: torch.dtype, *, head_dim: int = 32, window: int = 7, rpb: bool = True) -> Problem:
    """A layer of NAT-Tiny at batch 128 on a map of `length` x `length`, or one like it; a bias has float32."""
    heads = 112 // length
    return Problem(
        batch=128,
        axes=(Axis(length, window),) * 2,
        heads=heads,
        key_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cuda"),
        rpb_dtype=torch.float32 if rpb else None,
    )
