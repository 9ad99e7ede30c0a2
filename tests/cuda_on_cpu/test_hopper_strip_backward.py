"""The hopper_strip backward kernel's source, run on the CPU, against the reference in float64."""

from __future__ import annotations

import pytest
import test_strip_backward
from emulator import EmulatorRuntime
from test_strip_backward import Call, make_call, make_problem

from kernels.cuda import hopper_strip_backward


@pytest.fixture(autouse=True)
def _this_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_strip_backward, "strip_backward", hopper_strip_backward)


def assert_gradients(call: Call, needs_rpb_grad: bool = True) -> None:
    test_strip_backward.assert_gradients(call, needs_rpb_grad)


def test_one(emulator: EmulatorRuntime) -> None:
    assert_gradients(make_call(make_problem((16, 16), (7, 7), batch=4)))


@pytest.mark.parametrize("space", [(14, 14), (28, 28), (16, 28), (12, 24), (22, 20)])
def test_borders(emulator: EmulatorRuntime, space: tuple[int, int]) -> None:
    assert_gradients(make_call(make_problem(space, (7, 7), batch=4)))
