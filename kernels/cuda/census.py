"""Compiles what every kernel family calls its representative configurations, and says what they cost. Needs no GPU.

A configuration that spills registers, or whose matrix instructions the compiler had to serialise, has a defect.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import kernels.cuda
from kernels.cuda import jit
from kernels.cuda.jit import Compiled, KernelSource

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
QUICK_ARCHITECTURES = ("sm_80", "sm_90a")
SERIALISED = tuple(
    f"C75{n:02}" for n in range(8, 16)
)  # ptxas: wgmma waits after every instruction, for one reason or another


Item = tuple[str, KernelSource, str]
"""Family, kernel, architecture."""


@dataclass(frozen=True, slots=True)
class Entry:
    family: str
    source: KernelSource
    architecture: str
    compiled: Compiled

    @property
    def defect(self) -> str | None:
        if self.compiled.spilled_bytes:
            return f"spills {self.compiled.spilled_bytes} bytes"
        return next((f"wgmma serialised ({code})" for code in SERIALISED if code in self.compiled.log), None)


def families() -> dict[str, tuple[list[KernelSource], tuple[str, ...]]]:
    """Per module of kernels.cuda that has any: its `representative_sources()` and ARCHITECTURES (all by default)."""
    found = {}
    for module_info in pkgutil.iter_modules(kernels.cuda.__path__):
        if module_info.name == __name__.rpartition(".")[2]:
            continue
        module = importlib.import_module(f"kernels.cuda.{module_info.name}")
        if hasattr(module, "representative_sources"):
            sources = list(dict.fromkeys(module.representative_sources()))
            found[module_info.name] = (sources, tuple(getattr(module, "ARCHITECTURES", ARCHITECTURES)))
    return found


def few_of_each(sources: Iterable[KernelSource]) -> list[KernelSource]:
    """The first and the last configuration of each kernel."""
    by_kernel: defaultdict[tuple[str, str], list[KernelSource]] = defaultdict(list)
    for source in sources:
        by_kernel[source.header, source.function].append(source)
    return list(dict.fromkeys(chosen for group in by_kernel.values() for chosen in (group[0], group[-1])))


def work(architectures: Sequence[str] = ARCHITECTURES, quick: bool = False, only: str = "") -> list[Item]:
    """What there is to compile. `only` keeps kernels with that text in family or name."""
    return [
        (family, source, architecture)
        for family, (sources, served) in families().items()
        for source in (few_of_each(sources) if quick else sources)
        for architecture in architectures
        if architecture in served and only in f"{family} {source.name}"
    ]


def compile_all(items: Sequence[Item], seconds: float = float("inf")) -> Iterator[Entry]:
    """Compiles side by side; yields in order. After so many `seconds` no other item is begun, nor yielded.

    Raises CompilationError for the first that does not compile.
    """
    deadline = time.monotonic() + seconds

    def compiled(item: Item) -> Compiled | None:
        _, source, architecture = item
        return None if time.monotonic() > deadline else jit.compile_kernel(source, architecture)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for (family, source, architecture), result in zip(items, pool.map(compiled, items), strict=True):
            if result is not None:
                yield Entry(family, source, architecture, result)
