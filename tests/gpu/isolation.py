"""Calls in processes of their own: a hang, a crash or a lost CUDA context costs one call, not those that follow."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

STOP_SECONDS = 5.0


class WorkerError(RuntimeError):
    """A call ended its process, or went on for too long."""


@dataclass(frozen=True)
class Call:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: Future[Any]


def _serve(connection: Connection, is_usable: Callable[[], bool]) -> None:
    """Answers calls with (result, error, whether this process can take another) until it cannot."""
    usable = True
    while usable:
        function, arguments = connection.recv()
        result = error = None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        usable = is_usable()
        connection.send((result, error, usable))


class Workers:
    """`count` processes that take calls in order. One that hangs is killed; one that is lost in any way is replaced.

    `is_usable` is asked in the process after each call; a function at the top of a module, as are all that are called.
    """

    def __init__(self, count: int, time_limit: float, is_usable: Callable[[], bool]) -> None:
        self._time_limit = time_limit
        self._is_usable = is_usable
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._attend, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """A future of the result; its exception is a WorkerError, which says what the function raised or did."""
        future: Future[Any] = Future()
        self._calls.put(Call(function, arguments, future))
        return future

    def close(self) -> None:
        """Waits for the calls under way; those that have not begun are cancelled."""
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call.future.cancel()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _attend(self) -> None:
        context = multiprocessing.get_context("spawn")
        process = connection = None
        while (call := self._calls.get()) is not None:
            if not call.future.set_running_or_notify_cancel():
                continue
            if process is None or connection is None:
                connection, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._is_usable), daemon=True)
                process.start()
                theirs.close()
            usable = False
            try:
                connection.send((call.function, call.arguments))
                if not connection.poll(self._time_limit):
                    raise WorkerError(f"no answer within {self._time_limit:g} s: killed")
                result, error, usable = connection.recv()
                if error is not None:
                    raise WorkerError(error)
                call.future.set_result(result)
            except (EOFError, ConnectionError):
                process.join(STOP_SECONDS)
                call.future.set_exception(WorkerError(f"the process ended, exit code {process.exitcode}"))
            except Exception as raised:
                call.future.set_exception(raised)
            if not usable:
                _end(process, connection)
                process = connection = None
        if process is not None and connection is not None:
            _end(process, connection)


def _end(process: Any, connection: Connection) -> None:
    process.kill()
    process.join(STOP_SECONDS)
    connection.close()
