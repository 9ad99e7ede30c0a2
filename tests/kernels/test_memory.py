"""Peak memory of `tiled`, measured by PyTorch's own allocator records: bounded, and linear in the number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels import na2d


def peak_bytes(batch: int, side: int, heads: int, backward: bool) -> tuple[int, int]:
    """Most bytes that a call holds at a time, operands included, and the bytes of query, key, value and output."""
    leaves = [torch.randn(batch, side, side, heads, 32, requires_grad=backward) for _ in range(3)]
    grad_output = torch.ones_like(leaves[0])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        output: Tensor = na2d(*leaves, 7, backend="tiled")
        if backward:
            output.backward(grad_output)
    total = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    size = leaves[0].numel() * 4
    assert peak > size, "the profiler recorded no allocations"
    return peak + (4 if backward else 3) * size, 4 * size


@pytest.mark.parametrize("backward", [False, True])
def test_below_six_times_what_dense_attention_reads_and_writes(backward: bool) -> None:
    peak, dense = peak_bytes(8, 56, 2, backward)
    assert peak < 6 * dense


def test_linear_in_tokens() -> None:
    peaks = {side: peak_bytes(1, side, 1, backward=False)[0] for side in (128, 256, 512)}
    assert peaks[512] < 4.2 * peaks[256] < 4.2**2 * peaks[128]
