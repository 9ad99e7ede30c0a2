"""Data worker processes: what each is reading, so that one that dies or hangs can be named with the image it read."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from training.errors import DataError, one_line

NOTHING = -1
TIMED_OUT = re.compile(r"DataLoader timed out after (?P<seconds>[\d.]+) seconds")
DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?P<how>.*)", re.DOTALL)


class WorkerNotes:
    """Shared with the workers: for each its process id and the index of the image that it is reading."""

    own: "WorkerNotes | None" = None  # in a worker: the notes of its loader

    def __init__(self, workers: int) -> None:
        self.table = torch.full((workers, 2), NOTHING, dtype=torch.int64).share_memory_()

    def __call__(self, worker: int) -> None:
        """Called by a worker as it starts."""
        WorkerNotes.own = self
        self.table[worker, 0] = os.getpid()

    def find(self, pid: int) -> tuple[int, int] | None:
        """Number of the worker with this process id, and the index that it read last."""
        for worker, (known, index) in enumerate(self.table.tolist()):
            if known == pid:
                return worker, index
        return None


def note_reading(index: int) -> None:
    """Leave a note of what is read from now on; nothing happens outside a worker."""
    worker = get_worker_info()
    if worker is not None and WorkerNotes.own is not None:
        WorkerNotes.own.table[worker.id, 1] = index


class LazyLoader(DataLoader):
    """A DataLoader whose workers start with the first batch asked for, and leave notes.

    Lightning asks for an iterator before it has restored or advanced the epoch; reading then would read the wrong one.
    """

    def __init__(self, dataset: Any, *, num_workers: int, **options: Any) -> None:
        self.notes = WorkerNotes(num_workers)
        self.processes: list[BaseProcess] = []
        super().__init__(dataset, num_workers=num_workers, worker_init_fn=self.notes, **options)

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        # Kept here, because Lightning drops the iterator before anyone can ask how its workers ended.
        self.processes = getattr(batches, "_workers", [])
        yield from batches

    def ending(self, pid: int) -> str | None:
        """How the worker with this process id ended, if it is one of this loader's and has."""
        codes = {process.pid: process.exitcode for process in self.processes}
        code = codes.get(pid)
        if code is None:
            return None
        return f"ended with exit code {code}" if code >= 0 else f"was killed by signal {signal.Signals(-code).name}"


@contextmanager
def dead_workers_named(loaders: list[LazyLoader]) -> Iterator[None]:
    """Makes a worker's death or hang, which torch reports from wherever the main process happens to be, one line.

    Args:
        loaders: looked through when it happens, so it may grow until then.

    Raises:
        DataError: a worker has died; names it, what ended it, and the image that it was reading. Or no batch has come
            for `data.worker_timeout` seconds; names what each worker was reading.
    """
    try:
        yield
    except RuntimeError as error:
        if late := TIMED_OUT.search(str(error)):
            raise DataError(describe_hang(loaders, late["seconds"])) from error
        found = DIED.search(str(error))
        if found is None:
            raise
        raise DataError(describe_death(loaders, found)) from error


def describe_hang(loaders: list[LazyLoader], seconds: str) -> str:
    """What the workers of the loaders were doing that have any: which of them is waited for, torch does not say."""
    notes = []
    for loader in loaders:
        for worker, (pid, index) in enumerate(loader.notes.table.tolist() if loader.processes else ()):
            did = "has read nothing" if index == NOTHING else f"read {loader.dataset.images.label(index)} last"
            notes.append(f"worker {worker} " + ("has not started" if pid == NOTHING else f"(process {pid}) {did}"))
    return f"no batch for {seconds} s (data.worker_timeout): {', '.join(notes)}; go on with resume=last"


def describe_death(loaders: list[LazyLoader], found: re.Match[str]) -> str:
    """Which worker died, on what, and how.

    torch's own words are for one that died while others started, before the loader knew its processes. They name the
    signal only where SIGCHLD did not find torch waiting for a batch.
    """
    how = one_line(found["how"].split(". ")[0].split("\n")[0]).rstrip(".")
    how = how.replace("killed by signal: Killed", f"killed by signal {signal.SIGKILL.name}")
    for pid in map(int, found[1].split(",")):
        for loader in loaders:
            note = loader.notes.find(pid)
            if note is not None:
                worker, index = note
                reading = "" if index == NOTHING else f" while it read {loader.dataset.images.label(index)}"
                return (
                    f"data worker {worker} (process {pid}) {loader.ending(pid) or how}{reading}; if memory ran out,"
                    " lower data.workers or data.batch_size, then go on with resume=last"
                )
    return f"a data worker (process {found[1]}) {how}"
