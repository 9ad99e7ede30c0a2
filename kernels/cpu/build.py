"""From attention.cpp to loops that run: the machine's own C++ compiler, once, for exactly this processor."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.build_cache import build_once, cache_directory, digest
from kernels.errors import CompilationError, KernelError, MissingComponentError

SOURCE = Path(__file__).parent / "attention.cpp"
# The loops are vectorised by hand, so the compiler's own attempt at scattered statements only costs registers. NaN and
# infinity keep their meaning: no -ffast-math.
LANGUAGE = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
FLOATS = ("-fno-math-errno", "-fno-trapping-math", "-fno-tree-slp-vectorize")


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, or the first of g++, clang++ and c++ that there is.

    Raises MissingComponentError where there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    names = f"CXX={chosen[0]!r} is" if chosen else "g++, clang++ and c++ are"
    raise MissingComponentError(f"it is compiled for this processor, and {names} not installed")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops. PyTorch must be loaded before: they share its OpenMP threads.

    Raises a KernelError: MissingComponentError without a compiler, CompilationError with its log if it fails.
    """
    if sys.platform != "linux":
        raise MissingComponentError(f"it is compiled on Linux only, and this is {sys.platform}")
    command = [*compiler(), *LANGUAGE, *FLOATS]
    text = [path.read_text() for path in sorted(SOURCE.parent.glob("*.h"))] + [SOURCE.read_text()]
    path = cache_directory() / "cpu" / f"{digest(*text, *command, _version(command[0]), _processor())}.so"
    build_once(path, lambda: _compile(command))
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"{path} does not load: {error}") from error
    return loaded


@functools.cache
def why_not_here() -> str | None:
    """Why there can be no compiled loops on this machine, in one sentence. Compiles them, once."""
    try:
        library()
    except KernelError as error:
        said = str(error).strip().splitlines()[0].rstrip(".:")
        return f"{said[0].upper()}{said[1:]}."
    return None


def _compile(command: list[str]) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "attention.so"
        done = subprocess.run([*command, str(SOURCE), "-o", str(target)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilationError(f"{command[0]} rejects {SOURCE.name}\n{done.stderr}")
        return target.read_bytes(), done.stderr


def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
