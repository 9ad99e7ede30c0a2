"""The cache on disk of what is compiled at run time: kernels for a GPU, loops for a CPU.

Entries are found by content and never change. They are written aside and renamed into place, under a lock per entry:
processes that want the same one at once build it once.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kernels.errors import KernelError, MissingComponentError


def cache_directory() -> Path:
    """Where compiled kernels are kept: FASTNA_CACHE_DIR, or the user's cache directory."""
    if chosen := os.environ.get("FASTNA_CACHE_DIR"):
        return Path(chosen)
    try:
        import platformdirs
    except ImportError as error:
        raise MissingComponentError("platformdirs is not installed: install it, or set FASTNA_CACHE_DIR") from error
    return Path(platformdirs.user_cache_dir("fastna"))


def digest(*parts: str) -> str:
    """A key for the cache. Parts are kept apart: moving text from one to the next changes it."""
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()[:40]


def build_once(path: Path, build: Callable[[], tuple[bytes, str]]) -> tuple[str, bool]:
    """Sees to it that the file at `path` exists, and the compiler's log beside it.

    Whichever process comes first builds them, under a lock. Returns the log, and whether the file was there already.
    """
    if (log := _log_of(path)) is not None:
        return log, True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (log := _log_of(path)) is not None:
                return log, True
            binary, text = build()
            write_atomically(path.with_suffix(".log"), f"{text}\n{len(binary)}".encode())
            write_atomically(path, binary)
    except OSError as error:
        raise KernelError(
            f"cannot write the kernel cache {path.parent}: {error}; set FASTNA_CACHE_DIR to a writable one"
        ) from error
    return text, False


def _log_of(path: Path) -> str | None:
    """The log, where the file is there as it was written: its size ends the log. A full disk or a crash may cut it."""
    try:
        log, _, size = path.with_suffix(".log").read_text().rpartition("\n")
        return log if path.stat().st_size == int(size) else None
    except (OSError, ValueError):
        return None


def write_atomically(path: Path, content: bytes) -> None:
    """Writes aside and renames into place: a reader sees the old file or the new one, whole."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    aside.write_bytes(content)
    os.replace(aside, path)
