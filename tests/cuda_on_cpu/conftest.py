"""Tests in this folder run CUDA kernels on the CPU: `emulator` serves CPU tensors while a test runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulator import EmulatorRuntime

from kernels.cuda.runtime import use_runtime


@pytest.fixture
def emulator() -> Iterator[EmulatorRuntime]:
    runtime = EmulatorRuntime(seed=1)
    with use_runtime("cpu", runtime):
        yield runtime
