"""Tests in this folder run CUDA kernels on the CPU: `emulator` serves CPU tensors while a test runs.

Without a C++ compiler they are skipped, and say so.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from emulator import EmulatorRuntime

from kernels.cuda.runtime import use_runtime
from kernels.errors import MissingComponentError


@pytest.fixture
def emulator() -> Iterator[EmulatorRuntime]:
    runtime = EmulatorRuntime(seed=1)
    with use_runtime("cpu", runtime):
        yield runtime


def _skip_without_compiler() -> Generator[None, None, None]:
    try:
        return (yield)
    except MissingComponentError as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    return (yield from _skip_without_compiler())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    return (yield from _skip_without_compiler())
