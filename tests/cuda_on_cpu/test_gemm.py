"""The GEMM kernels' sources, run on the CPU, against the reference in float64: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from emulator import EmulatorRuntime
from materialised import (
    TF32_TOLERANCE,
    Case,
    assert_equals_reference,
    assert_repeats,
    case_named,
    every_case,
    problem_of,
    run,
    tensors_of,
)

from kernels.cuda import gemm

pytestmark = pytest.mark.usefixtures("emulator")


@every_case
def test_equals_reference(case: Case) -> None:
    assert_equals_reference(case, "gemm")
