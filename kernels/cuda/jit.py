"""From a kernel's source text to a cubin: rendering, NVRTC, and a cache on disk.

A kernel is a device header `src/NAME.cuh` with a function template; a `KernelSource` says how to instantiate it. The cache key is
a digest of everything that decides the result: the rendered text, the contents of every own header it includes, the architecture,
the options and NVRTC's version. Entries are written aside and renamed into place, under a lock per key: processes that want
the same kernel at once compile it once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.cuda.errors import CompilationError, MissingComponentError, UnsupportedDeviceError

KERNELS = Path(__file__).resolve().parent.parent
INCLUDE_ROOTS = (KERNELS, KERNELS / "include")
OPTIONS = ("-std=c++17", "--ptxas-options=-v")
ENTRY_POINT = "fastna_kernel"

CXX_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bf16"}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def instantiate(template: str, *values: object) -> str:
    """C++ text of a class template's instance: `instantiate("Tile", torch.float16, 8, True)` is `Tile<half, 8, true>`."""
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

    `header` is the file under kernels/, `function` the template in it, `config` its argument (a type or a list, as C++ text;
    empty for a function that is no template), `arguments` the struct it takes; all names are of namespace fastna. `threads` and
    `min_blocks` are the launch bounds: threads of a block, and blocks that an SM must hold at once.
    """

    header: str
    function: str
    config: str
    arguments: str
    threads: int
    min_blocks: int = 1

    @property
    def name(self) -> str:
        """As people read it: `flash_forward<FlashConfig<half, 32>>`."""
        return f"{self.function}<{self.config}>" if self.config else self.function

    def render(self) -> str:
        """The text of the translation unit."""
        return (
            f'#include "{self.header}"\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {self.min_blocks})\n'
            f"{ENTRY_POINT}(const __grid_constant__ fastna::{self.arguments} args) {{\n"
            f"  using namespace fastna;\n"
            f"  fastna::{self.name}(args);\n"
            f"}}\n"
        )


def collect_headers(text: str, roots: Sequence[Path] = INCLUDE_ROOTS) -> dict[str, str]:
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
