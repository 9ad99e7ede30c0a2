"""From a kernel's source text to a cubin: rendering, NVRTC, and a cache on disk.

A kernel is a device header `src/NAME.cuh` with a function template; a `KernelSource` says how to instantiate it. The
cache key is a digest of everything that decides the result: the rendered text, the contents of every own header it
includes, the architecture, the options and NVRTC's version.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.build_cache import build_once, cache_directory, digest
from kernels.errors import CompilationError, MissingComponentError, UnsupportedDeviceError

KERNELS = Path(__file__).resolve().parent.parent
INCLUDE_ROOTS = (KERNELS, KERNELS / "include")
OPTIONS = ("-std=c++17", "--ptxas-options=-v")
ENTRY_PREFIX = "fastna_"
"""Of every kernel's name, by which profilers and compute-sanitizer know it."""

CXX_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bf16"}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def instantiate(template: str, *values: object) -> str:
    """A class template's instance as C++ text: `instantiate("Tile", torch.half, 8, True)` is `Tile<half, 8, true>`."""
    return f"{template}<{', '.join(map(_cxx, values))}>"


def _cxx(value: object) -> str:
    if isinstance(value, torch.dtype):
        return CXX_TYPES[value]
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


@dataclass(frozen=True, slots=True)
class KernelSource:
    """How to instantiate one kernel.

    `header` is the file under kernels/, `function` the template in it, `config` its argument (a type or a list, as C++
    text; empty for a function that is no template), `arguments` the struct it takes; all names are of namespace fastna.
    `threads` and `min_blocks` are the launch bounds: threads of a block, and blocks that an SM must hold at once.
    `shared_bytes`, where given, is the dynamic shared memory that this configuration launches with; it is for reports.
    """

    header: str
    function: str
    config: str
    arguments: str
    threads: int
    min_blocks: int = 1
    shared_bytes: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """As people read it: `flash_forward<FlashConfig<half, 32>>`."""
        return f"{self.function}<{self.config}>" if self.config else self.function

    @property
    def entry_point(self) -> str:
        """As the driver and profilers name it."""
        return ENTRY_PREFIX + self.function

    def render(self) -> str:
        """The text of the translation unit."""
        return (
            f'#include "{self.header}"\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {self.min_blocks})\n'
            f"{self.entry_point}(const __grid_constant__ fastna::{self.arguments} args) {{\n"
            f"  using namespace fastna;\n"
            f"  fastna::{self.name}(args);\n"
            f"}}\n"
        )


def collect_headers(text: str, roots: Sequence[Path]) -> dict[str, str]:
    """Contents of every header that `text` includes in quotes, directly or not, by the name it is included under.

    A name found under no root is left to the compiler to complain about.
    """
    headers: dict[str, str] = {}
    pending = _INCLUDE.findall(text)
    while pending:
        name = pending.pop()
        path = next((root / name for root in roots if (root / name).is_file()), None)
        if name not in headers and path is not None:
            headers[name] = path.read_text()
            pending += _INCLUDE.findall(headers[name])
    return headers


@dataclass(frozen=True, slots=True)
class Compiled:
    """A cubin on disk, and what ptxas said of it."""

    path: Path
    log: str
    cached: bool
    """Whether it was there already."""

    @property
    def seconds(self) -> float:
        """Processor time that the compiler took, back when it ran."""
        return float(re.findall(r"compiled in (\S+) s", self.log)[-1])

    @property
    def registers(self) -> int:
        return _reported(r"Used (\d+) registers", self.log)

    @property
    def spilled_bytes(self) -> int:
        """Bytes stored to local memory for want of registers."""
        return _reported(r"(\d+) bytes spill stores", self.log)

    @property
    def stack_bytes(self) -> int:
        """Local memory per thread: spills, and arrays indexed at run time."""
        return _reported(r"(\d+) bytes stack frame", self.log)


def _reported(pattern: str, log: str) -> int:
    return max((int(number) for number in re.findall(pattern, log)), default=0)


@functools.cache
def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise MissingComponentError(
            f'CuPy is not usable ({error}): pip install "cupy-cuda13x[ctk]" (or cupy-cuda12x[ctk])'
        ) from error
    try:
        nvrtc.getVersion()
    except Exception as error:
        raise MissingComponentError(
            f'CuPy finds no NVRTC ({error}): install CuPy with its CUDA components, pip install "cupy-cuda13x[ctk]"'
        ) from error
    return nvrtc


def architecture_of(capability: tuple[int, int]) -> str:
    """NVRTC's name of the architecture to compile for, such as `sm_90a`.

    A device that NVRTC does not know runs code for an older minor version of its generation. Architecture-specific
    code (the `a`) is asked for where a generation has instructions of its own, which only run there.

    Raises UnsupportedDeviceError below 8.0, and where NVRTC knows nothing of the device's generation.
    """
    major, minor = capability
    if capability < (8, 0):
        raise UnsupportedDeviceError(f"compute capability {major}.{minor}: the CUDA kernels need 8.0 (Ampere) or newer")
    nvrtc = _nvrtc()
    minors = [arch % 10 for arch in nvrtc.getSupportedArchs() if arch // 10 == major and arch % 10 <= minor]
    if not minors:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise UnsupportedDeviceError(
            f"compute capability {major}.{minor}: NVRTC {version} compiles for {nvrtc.getSupportedArchs()}; "
            "install a newer CuPy [ctk]"
        )
    exact = capability == (major, max(minors))
    return f"sm_{major}{max(minors)}{'a' if exact and capability == (9, 0) else ''}"


def compile_kernel(source: KernelSource, architecture: str) -> Compiled:
    """The kernel's cubin for one architecture, from the cache or from NVRTC. Needs no GPU.

    Raises CompilationError with the compiler's log, MissingComponentError without CuPy or NVRTC.
    """
    nvrtc = _nvrtc()
    text = source.render()
    headers = collect_headers(text, INCLUDE_ROOTS)
    line_numbers = os.environ.get("FASTNA_LINEINFO", "0") != "0"  # for profilers and compute-sanitizer
    options = (f"-arch={architecture}", *OPTIONS, *(("-lineinfo",) if line_numbers else ()))
    key = digest(text, *(part for item in sorted(headers.items()) for part in item), *options, str(nvrtc.getVersion()))
    path = cache_directory() / "cubin" / key[:2] / f"{key}.cubin"
    return Compiled(path, *build_once(path, lambda: _run_nvrtc(source, text, headers, options)))


def _run_nvrtc(source: KernelSource, text: str, headers: dict[str, str], options: tuple[str, ...]) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    names = tuple(name.encode() for name in headers)
    contents = tuple(content.encode() for content in headers.values())
    began = time.thread_time()
    program = nvrtc.createProgram(text, f"{source.function}.cu", contents, names)
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise CompilationError(
                f"NVRTC rejects {source.name} of {source.header} ({error}), options {' '.join(options)}:\n"
                f"{nvrtc.getProgramLog(program)}"
            ) from error
        # CuPy takes the size that NVRTC gives for one with a terminating zero, and cuts the last byte off.
        cubin = nvrtc.getCUBIN(program) + b"\0"
        return cubin, f"{nvrtc.getProgramLog(program)}\ncompiled in {time.thread_time() - began:.3f} s\n"
    finally:
        nvrtc.destroyProgram(program)
