"""Where kernels run: a CUDA device through CuPy, or whatever a test installs in its place.

Backends ask `kernel(source, device)` for something to launch and `properties(device)` for what the hardware offers, and
know no more. A runtime serves one type of device. `CudaRuntime` serves "cuda"; the emulator of tests/cuda_on_cpu serves
"cpu" where a test installs it, so that a backend runs end to end without a GPU, its host arithmetic included.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels import calls
from kernels.cuda import jit, tensor_map
from kernels.cuda.jit import KernelSource
from kernels.errors import (
    KernelError,
    LaunchError,
    MissingComponentError,
    SharedMemoryError,
    UnsupportedDeviceError,
)
from kernels.problem import Problem

MAX_GRID = 2**31 - 1
STATIC_SHARED_LIMIT = 48 << 10  # above, the driver wants to be asked per function


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    """Bytes of shared memory that one block may have."""
    name: str = ""
    """As its maker calls it; empty for what is no product."""


@dataclass(frozen=True, slots=True)
class Attributes:
    registers: int
    local_bytes: int
    """Local memory per thread: spills, and arrays indexed at run time."""


class Kernel(Protocol):
    def launch(self, grid: int, shared_bytes: int, arguments: bytes, stream: int | None = None) -> None:
        """Runs `grid` blocks with `shared_bytes` of dynamic shared memory each; a grid of 0 does nothing.

        `arguments` is the packed argument struct. `stream` is a raw CUDA stream; None is PyTorch's current one of the
        kernel's device. Raises SharedMemoryError, LaunchError.
        """

    @property
    def attributes(self) -> Attributes: ...


class Runtime(Protocol):
    """What serves devices of one type. It may also have a `timer(device)`, see the function of that name."""

    def kernel(self, source: KernelSource, device: torch.device) -> Kernel: ...
    def prepare(self, sources: Iterable[KernelSource], device: torch.device) -> None: ...
    def properties(self, device: torch.device) -> DeviceProperties: ...
    def why_not(self, device: torch.device) -> str | None: ...
    def tensor_map_encoder(
        self,
        dtype: torch.dtype,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        steps: Sequence[int],
        swizzle: int,
    ) -> Callable[[int], bytes]:
        """What makes tensor maps of addresses: see kernels.cuda.tensor_map.encoder."""


class CudaKernel:
    """One kernel loaded on one device."""

    def __init__(self, source: KernelSource, device: torch.device, path: str) -> None:
        import cupy
        from cupy_backends.cuda.api import driver

        self.source = source
        self.device = device
        self._driver = driver
        with torch.cuda.device(device), cupy.cuda.Device(device.index):
            try:
                self._raw = cupy.RawModule(path=path).get_function(source.entry_point)
                self._function: int = self._raw.kernel.ptr
                self._attributes = Attributes(self._raw.num_regs, self._raw.local_size_bytes)
                self._context: int = driver.ctxGetCurrent()
            except driver.CUDADriverError as error:
                raise KernelError(f"{source.name} does not load on {device}: {error}") from error
        self._shared_allowed = STATIC_SHARED_LIMIT

    @property
    def attributes(self) -> Attributes:
        return self._attributes

    def launch(self, grid: int, shared_bytes: int, arguments: bytes, stream: int | None = None) -> None:
        if grid == 0:
            return None
        if shared_bytes > self._shared_allowed:
            self._allow_shared(shared_bytes)
        index = self.device.index
        if stream is None:
            stream = torch._C._cuda_getCurrentRawStream(index)
        # A c_char_p is a pointer to the bytes, so its own address is that of an array of one kernel parameter. Both
        # live until the driver has copied the parameters, which it does before it returns.
        pointer = ctypes.c_char_p(arguments)
        parameters = ctypes.addressof(pointer)
        threads = self.source.threads
        try:
            if torch._C._cuda_getDevice() == index:
                self._driver.launchKernel(
                    self._function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, 0
                )
            else:
                with torch.cuda.device(index):
                    self._driver.launchKernel(
                        self._function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, 0
                    )
        except (self._driver.CUDADriverError, OverflowError) as error:
            if "CUDA_ERROR_INVALID_CONTEXT" in str(error) and self._driver.ctxGetCurrent() != self._context:
                # A thread that has not touched the device, as autograd starts them: the CUDA runtime makes the context
                # current with a thread's first call, but PyTorch hands out cached memory without one.
                self._driver.ctxSetCurrent(self._context)
                return self.launch(grid, shared_bytes, arguments, stream)
            raise LaunchError(
                f"{self.source.name} on {self.device}: {error}; grid {grid} (at most {MAX_GRID}), {threads} threads, "
                f"{shared_bytes} bytes of shared memory, {self._attributes.registers} registers, stream {stream:#x}"
            ) from error

    def _allow_shared(self, shared_bytes: int) -> None:
        limit = cuda_properties(self.device).shared_memory
        if shared_bytes > limit:
            raise SharedMemoryError(
                f"{self.source.name} wants {shared_bytes} bytes of shared memory per block; {self.device} has {limit}"
            )
        with torch.cuda.device(self.device):
            self._raw.max_dynamic_shared_size_bytes = shared_bytes
        self._shared_allowed = shared_bytes


class CudaRuntime:
    """CUDA devices through CuPy. Each kernel is compiled once per architecture and loaded once per device."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[KernelSource, int], CudaKernel] = {}
        self._lock = threading.Lock()

    def kernel(self, source: KernelSource, device: torch.device) -> CudaKernel:
        """The loaded kernel; compiles it where the cache on disk has none.

        Raises a KernelError: CompilationError, MissingComponentError, UnsupportedDeviceError; and during the capture of
        a CUDA graph, where nothing can be loaded.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        found = self._kernels.get((source, index))
        if found is not None:
            return found
        if torch.cuda.is_current_stream_capturing():
            raise KernelError(
                f"{source.name} is not loaded yet, and loading cannot be captured: "
                "make the call once before capturing a CUDA graph"
            )
        device = torch.device("cuda", index)
        compiled = jit.compile_kernel(source, jit.architecture_of(cuda_properties(device).capability))
        with self._lock:
            if (source, index) not in self._kernels:
                self._kernels[source, index] = CudaKernel(source, device, str(compiled.path))
            return self._kernels[source, index]

    def prepare(self, sources: Iterable[KernelSource], device: torch.device) -> None:
        """Compiles kernels side by side (NVRTC lets the interpreter go), then loads them."""
        architecture = jit.architecture_of(cuda_properties(device).capability)
        wanted = list(dict.fromkeys(sources))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda source: jit.compile_kernel(source, architecture), wanted))
        for source in wanted:
            self.kernel(source, device)

    def properties(self, device: torch.device) -> DeviceProperties:
        return cuda_properties(device)

    def why_not(self, device: torch.device) -> str | None:
        return _why_not_cuda(device)

    def timer(self, device: torch.device) -> Timer | None:
        """None while a CUDA graph is captured."""
        return None if torch.cuda.is_current_stream_capturing() else functools.partial(_seconds, device)

    tensor_map_encoder = staticmethod(tensor_map.encoder)


Timer = Callable[[Sequence[Callable[[], object]]], list[float]]
"""Seconds of the device per call, of each of several launches."""

TIMED_ROUNDS = 5
TIMED_LAUNCHES = 10
HEAD_START_CYCLES = 500_000  # in which the host enqueues the launches of a round, so that none waits for it


def _seconds(device: torch.device, launches: Sequence[Callable[[], object]]) -> list[float]:
    """The best of several rounds, all launches in turn in each, so that a drift of the clock hits all alike."""
    best = [float("inf")] * len(launches)
    with torch.cuda.device(device):
        for launch in launches:
            launch()
        for _ in range(TIMED_ROUNDS):
            for index, launch in enumerate(launches):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(HEAD_START_CYCLES)
                begin.record()
                for _ in range(TIMED_LAUNCHES):
                    launch()
                end.record()
                end.synchronize()
                best[index] = min(best[index], begin.elapsed_time(end) / 1e3 / TIMED_LAUNCHES)
    return best


@functools.cache
def cuda_properties(device: torch.device) -> DeviceProperties:
    properties = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        name=properties.name,
    )


@functools.cache
def _why_not_cuda(device: torch.device) -> str | None:
    try:
        jit.architecture_of(cuda_properties(device).capability)
        import cupy  # noqa: F401
    except (UnsupportedDeviceError, MissingComponentError, ImportError) as error:
        return str(error)
    return None


_runtimes: dict[str, Runtime] = {"cuda": CudaRuntime()}


@contextlib.contextmanager
def use_runtime(device_type: str, runtime: Runtime) -> Iterator[None]:
    """Within the block, `runtime` serves devices of this type. For tests."""
    previous = _runtimes.get(device_type)
    _runtimes[device_type] = runtime
    calls.forget()
    try:
        yield
    finally:
        calls.forget()
        if previous is None:
            del _runtimes[device_type]
        else:
            _runtimes[device_type] = previous


def installed_runtime(device: torch.device) -> Runtime | None:
    return _runtimes.get(device.type)


def _serving(device: torch.device) -> Runtime:
    runtime = _runtimes.get(device.type)
    if runtime is None:
        raise UnsupportedDeviceError(f"the kernels run on CUDA devices; the tensors are on {device}")
    return runtime


def kernel(source: KernelSource, device: torch.device) -> Kernel:
    """The kernel, compiled and loaded for `device`. Cheap after the first time."""
    return _serving(device).kernel(source, device)


def prepare(sources: Iterable[KernelSource], device: torch.device) -> None:
    """Compiles and loads several kernels, side by side where possible."""
    _serving(device).prepare(sources, device)


def properties(device: torch.device) -> DeviceProperties:
    """What the hardware offers a block."""
    return _serving(device).properties(device)


def timer(device: torch.device) -> Timer | None:
    """What times launches on `device` now; None where time says nothing, or now is no time for it."""
    find = getattr(_serving(device), "timer", None)
    return None if find is None else find(device)


def tensor_map_encoder(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    steps: Sequence[int],
    swizzle: int,
) -> Callable[[int], bytes]:
    """What makes tensor maps of addresses on `device`: see kernels.cuda.tensor_map.encoder."""
    return _serving(device).tensor_map_encoder(dtype, sizes, strides, box, steps, swizzle)


def why_not_here(problem: Problem) -> str | None:
    """Why no CUDA kernel can run where the problem's tensors are, in one sentence; None where it can."""
    runtime = _runtimes.get(problem.device.type)
    if runtime is None:
        return f"it runs on CUDA devices; the tensors are on {problem.device}"
    return runtime.why_not(problem.device)
