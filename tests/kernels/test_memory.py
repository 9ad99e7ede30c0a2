"""Peak memory of `tiled`: bounded, and linear in the number of tokens."""

from __future__ import annotations

import pytest

from benchmarks.memory import LAYER, peak_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_below_six_times_what_dense_attention_reads_and_writes(backward: bool) -> None:
    peak, dense = peak_bytes(*LAYER, backward)
    assert peak < 6 * dense


def test_linear_in_tokens() -> None:
    peaks = {side: peak_bytes(1, side, 1, backward=False)[0] for side in (128, 256, 512)}
    assert peaks[512] < 4.2 * peaks[256] < 4.2**2 * peaks[128]
