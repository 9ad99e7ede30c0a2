"""The worker processes of the GPU suite: a call that hangs, crashes or spoils its process fails alone."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Iterator
from functools import partial

import pytest
from isolation import WorkerError, Workers

USABLE, SPOILT = partial(bool, 1), partial(bool, 0)


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(1, 60, USABLE)
    yield workers
    workers.close()


def test_one_process_answers_in_order(workers: Workers) -> None:
    first, second, third = (workers.submit(os.getpid), workers.submit(operator.add, 2, 3), workers.submit(os.getpid))
    assert first.result() == third.result() != os.getpid()
    assert second.result() == 5


def test_an_exception_is_told_by_name(workers: Workers) -> None:
    failing, following = workers.submit(operator.truediv, 1, 0), workers.submit(operator.add, 2, 3)
    with pytest.raises(WorkerError, match="ZeroDivisionError: division by zero"):
        failing.result()
    assert following.result() == 5


def test_a_crash_fails_one_call(workers: Workers) -> None:
    crash, following = workers.submit(os._exit, 7), workers.submit(operator.add, 2, 3)
    with pytest.raises(WorkerError, match="the process ended, exit code 7"):
        crash.result()
    assert following.result() == 5


def test_a_hang_is_killed_and_fails_one_call() -> None:
    workers = Workers(1, 5, USABLE)
    hang, following = workers.submit(time.sleep, 3600), workers.submit(operator.add, 2, 3)
    with pytest.raises(WorkerError, match="no answer within 5 s: killed"):
        hang.result()
    assert following.result() == 5
    workers.close()


def test_a_spoilt_process_is_replaced() -> None:
    workers = Workers(1, 60, SPOILT)
    processes = [workers.submit(os.getpid).result() for _ in range(2)]
    assert processes[0] != processes[1]
    workers.close()


def test_closing_cancels_what_has_not_begun() -> None:
    workers = Workers(1, 60, USABLE)
    calls = [workers.submit(time.sleep, 1) for _ in range(3)]
    workers.close()
    assert calls[-1].cancelled()
