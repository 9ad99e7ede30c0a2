"""Choices between a few configurations of a kernel: measured once per class of problem and device, and kept.

A kernel family names its candidates, its own guess first. `choose` answers from the first of these that knows:
  1. the device's table in this repository (kernels/cuda/tables/DEVICE.json), of measurements that someone looked at;
  2. the user's table (tuning/DEVICE.json in the cache directory), of earlier measurements;
  3. a measurement now, which is kept in the user's table, so that it is the last;
  4. the guess.
FASTNA_TUNING says how far to go: `measure` (the default), `tables` (1, 2 and 4), `off` (the guess at once). Nothing is
measured while a CUDA graph is captured, under PyTorch's deterministic algorithms, or where time says nothing, as on the
emulator. An entry counts only for the sources that it was measured with. A measurement compiles at most
`MOST_CANDIDATES` kernels, side by side, and then takes a few hundredths of a second.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock

from kernels.build_cache import cache_directory, digest, write_atomically
from kernels.cuda import jit, runtime
from kernels.cuda.jit import KernelSource

TABLES = Path(__file__).resolve().parent / "tables"
MODES = ("measure", "tables", "off")
MOST_CANDIDATES = 4
MARGIN = 0.97
"""Of the guess's time, that another candidate must stay under: less is noise."""

Candidate = TypeVar("Candidate")
Table = dict[str, dict[str, Any]]
"""By `KERNEL: CLASS`: the choice, the microseconds of all candidates, and the digest of the sources."""


def mode() -> str:
    """FASTNA_TUNING. Raises ValueError for what is none of `MODES`."""
    chosen = os.environ.get("FASTNA_TUNING", MODES[0])
    if chosen not in MODES:
        raise ValueError(f"FASTNA_TUNING={chosen!r} must be one of {', '.join(MODES)}")
    return chosen


def choose(
    name: str,
    candidates: Sequence[Candidate],
    device: torch.device,
    source: Callable[[Candidate], KernelSource],
    start: Callable[[Candidate], Callable[[], object]],
) -> Candidate:
    """The candidate to use, of at most `MOST_CANDIDATES`; the first is the guess.

    Args:
        name: `KERNEL: CLASS`, as a reader of the table should see it; everything on which the best choice depends.
        candidates: told apart by `str`, which is what a table holds.
        device: where the kernel will run.
        source: the kernel of a candidate.
        start: loads a candidate's kernel and returns what launches it once.
    """
    if len(candidates) > MOST_CANDIDATES:
        raise ValueError(f"{name}: {len(candidates)} candidates; at most {MOST_CANDIDATES} are measured")
    guess = candidates[0]
    file_name = _file_name(runtime.properties(device).name)
    if len(candidates) == 1 or mode() == "off" or file_name is None:
        return guess
    by_text = {str(candidate): candidate for candidate in candidates}
    sources = _digest_of([source(candidate) for candidate in candidates])
    own = cache_directory() / "tuning" / file_name
    for path in (TABLES / file_name, own):
        known = _known(_read(path), name, sources, by_text)
        if known is not None:
            return by_text[known]
    timer = runtime.timer(device)
    if mode() != "measure" or timer is None or torch.are_deterministic_algorithms_enabled():
        return guess
    runtime.prepare([source(candidate) for candidate in candidates], device)
    seconds = dict(zip(by_text, timer([start(candidate) for candidate in candidates]), strict=True))
    fastest = min(seconds, key=seconds.__getitem__)
    if seconds[fastest] > MARGIN * seconds[str(guess)]:
        fastest = str(guess)
    microseconds = {text: round(taken * 1e6, 2) for text, taken in seconds.items()}
    return by_text[_keep(own, name, {"choice": fastest, "microseconds": microseconds, "sources": sources})]


def _known(table: Table, name: str, sources: str, candidates: Container[object]) -> str | None:
    """The choice that the table holds, if it still is one."""
    entry = table.get(name, {})
    choice = entry.get("choice")
    return choice if entry.get("sources") == sources and choice in candidates else None


def _keep(path: Path, name: str, entry: dict[str, Any]) -> str:
    """Puts an entry into the table and returns the choice there: that of whichever process was first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            table = _read(path)
            known = _known(table, name, entry["sources"], entry["microseconds"])
            if known is not None:
                return known
            table[name] = entry
            write_atomically(path, (json.dumps(table, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        warnings.warn(f"the choice for {name} is not kept: {error}; set FASTNA_CACHE_DIR", stacklevel=2)
    return str(entry["choice"])


def _read(path: Path) -> Table:
    """The table, empty where there is none or it is spoilt."""
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
            raise ValueError("not an object of objects")
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring the tuning table {path}: {error}", stacklevel=3)
        return {}
    return table


def _file_name(device_name: str) -> str | None:
    slug = re.sub("[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return f"{slug}.json" if slug else None


def _digest_of(sources: Sequence[KernelSource]) -> str:
    """Of the headers that the kernels are made of: another version of them may prefer another choice."""
    includes = "".join(f'#include "{header}"\n' for header in sorted({source.header for source in sources}))
    headers = jit.collect_headers(includes, jit.INCLUDE_ROOTS)
    return digest(*(part for item in sorted(headers.items()) for part in item))[:12]
