"""A device where nothing runs: which kernels calls would take, and what they cost the host, told without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from kernels.cuda import tensor_map
from kernels.cuda.jit import KernelSource
from kernels.cuda.runtime import Attributes, DeviceProperties, use_runtime

HOPPER = DeviceProperties(capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)


class DryKernel:
    """Takes launches, and does nothing."""

    attributes = Attributes(registers=0, local_bytes=0)

    def launch(self, grid: int, shared_bytes: int, arguments: bytes, stream: int | None = None) -> None:
        pass


class DryRuntime:
    """A runtime (see kernels.cuda.runtime) that keeps which kernels it was asked for. Results stay uninitialised."""

    def __init__(self, properties: DeviceProperties = HOPPER) -> None:
        self.asked: dict[KernelSource, None] = {}
        self._properties = properties

    def kernel(self, source: KernelSource, device: torch.device) -> DryKernel:
        self.asked[source] = None
        return DryKernel()

    def prepare(self, sources: Iterable[KernelSource], device: torch.device) -> None:
        self.asked |= dict.fromkeys(sources)

    def properties(self, device: torch.device) -> DeviceProperties:
        return self._properties

    def why_not(self, device: torch.device) -> str | None:
        return None

    def tensor_map_encoder(self, *described: Any, **more: Any) -> Callable[[int], bytes]:
        return lambda address: bytes(tensor_map.BYTES)


def sources_of(run: Callable[[], object], properties: DeviceProperties = HOPPER) -> list[KernelSource]:
    """The kernels that `run`, on CPU tensors, would take on a device of these `properties`."""
    dry = DryRuntime(properties)
    with use_runtime("cpu", dry):
        run()
    return list(dry.asked)
