"""`tiled` against `reference` on random problems: forward and every gradient. More of them by `make fuzz N=...`."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_calls import Call, assert_same, calls, results

from kernels import tiled

EXAMPLES = int(os.environ.get("FASTNA_FUZZ", 300))


@pytest.mark.timeout(0 if EXAMPLES > 1000 else 300)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), chunk=st.sampled_from((1, 2000, 1 << 20)))
def test_tiled_equals_reference(call: Call, chunk: int) -> None:
    tensors = call.tensors()
    with mock.patch.dict(tiled.CHUNK_SCORES, cpu=chunk):
        found = results(call, tensors, "tiled")
    assert_same(found, results(call, tensors, "reference"), 1e-10)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), dtype=st.sampled_from(("float16", "bfloat16")))
def test_tiled_in_half_precision(call: Call, dtype: str) -> None:
    tensors = call.tensors(getattr(torch, dtype))
    exact = results(call, {name: tensor.double() for name, tensor in tensors.items()}, "reference")
    assert_same(results(call, tensors, "tiled"), exact, {"float16": 2e-3, "bfloat16": 1e-2}[dtype])
