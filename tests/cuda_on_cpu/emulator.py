"""`EmulatorRuntime`: the CUDA sources, compiled by g++ and run on the CPU, in place of a device.

The text compiled is the one that NVRTC gets; only the body of the primitives differs. engine.cpp says what is checked.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import operators
from kernels.build_cache import build_once, digest
from kernels.cuda import jit
from kernels.cuda.dry import DryRuntime
from kernels.cuda.jit import KernelSource
from kernels.cuda.runtime import Attributes, DeviceProperties
from kernels.errors import CompilationError, KernelError, LaunchError, MissingComponentError, SharedMemoryError

HERE = Path(__file__).resolve().parent
ROOTS = (*jit.INCLUDE_ROOTS, HERE)
COMMON = ("-std=c++17", "-fPIC", "-c", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall")
ENGINE_FLAGS = (*COMMON, "-O3")
# Uninitialised variables hold a pattern, not what a lucky stack slot left there; an index outside a local array traps.
KERNEL_FLAGS = (
    *COMMON,
    "-O1",
    "-DFASTNA_EMULATE",
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",
    "-Wno-unknown-pragmas",
)
# Every load and store calls a function, which the engine has in place of the sanitizer's library.
WATCHED_FLAGS = (*KERNEL_FLAGS, "-fsanitize=thread")
SHARED_MEMORY = 227 << 10
_PLAIN_MAP = struct.Struct("<6Q17I")
_MAP_MAGIC = 0x70616D726F736E65
TIME_LIMIT = 120  # seconds of CPU time for one launch


class EmulationError(LaunchError):
    """A kernel did what a GPU leaves undefined."""


def _cache() -> Path:
    return Path(tempfile.gettempdir()) / f"fastna-emulator-{os.getuid()}"


@functools.cache
def _compiler_version() -> str:
    if shutil.which("g++") is None:
        raise MissingComponentError("the CUDA kernels run on the CPU as g++ compiles them, and there is no g++ here")
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _compile(text: str, name: str, flags: Sequence[str]) -> Path:
    """A shared library, compiled once per content over all processes."""
    headers = jit.collect_headers(text, ROOTS)
    key = digest(text, *(part for item in sorted(headers.items()) for part in item), *flags, _compiler_version())
    path = _cache() / f"{key}.so"

    def build() -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "kernel.cpp").write_text(text)
            includes = [f"-I{root}" for root in ROOTS]
            for arguments in (*flags, *includes, "kernel.cpp"), ("-shared", "kernel.o", "-o", "kernel.so"):
                done = subprocess.run(["g++", *arguments], cwd=folder, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise CompilationError(f"g++ rejects {name}:\n{done.stderr}")
            return (Path(folder) / "kernel.so").read_bytes(), done.stderr

    build_once(path, build)
    return path


@functools.cache
def engine() -> ctypes.CDLL:
    """The engine, its symbols visible to the kernels loaded after it."""
    path = _compile((HERE / "engine.cpp").read_text(), "the emulator's engine", ENGINE_FLAGS)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.emulator_launch.restype = ctypes.c_char_p
    library.emulator_launch.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_ulonglong,
        ctypes.c_int,
        ctypes.c_bool,
    ]
    library.emulator_guarded.restype = ctypes.c_void_p
    library.emulator_guarded.argtypes = [ctypes.c_ulonglong, ctypes.c_bool]
    library.emulator_release.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
    return library


def render(source: KernelSource) -> str:
    """The translation unit, with a door through which arguments come as bytes."""
    return source.render() + (
        f'extern "C" const unsigned emulated_argument_bytes = sizeof(fastna::{source.arguments});\n'
        f'extern "C" void emulated_entry(const void* args) {{\n'
        f"  {source.entry_point}(*static_cast<const fastna::{source.arguments}*>(args));\n"
        f"}}\n"
    )


_running = threading.Lock()  # the engine runs one grid at a time


@dataclass
class EmulatedKernel:
    source: KernelSource
    runtime: EmulatorRuntime

    def __post_init__(self) -> None:
        self._library = ctypes.CDLL(str(_compile(render(self.source), self.source.name, self.runtime.flags)))
        self._entry = ctypes.cast(self._library.emulated_entry, ctypes.c_void_p)
        self._argument_bytes = ctypes.c_uint.in_dll(self._library, "emulated_argument_bytes").value

    @property
    def attributes(self) -> Attributes:
        return Attributes(registers=0, local_bytes=0)

    def launch(self, grid: int, shared_bytes: int, arguments: bytes, stream: int | None = None) -> None:
        name, threads = self.source.name, self.source.threads
        if len(arguments) != self._argument_bytes:
            raise LaunchError(
                f"{name}: {len(arguments)} bytes of arguments; {self.source.arguments} has {self._argument_bytes}"
            )
        if not 0 < threads <= 1024 or threads % 32:
            raise LaunchError(f"{name}: {threads} threads; a multiple of 32 up to 1024 it must be")
        if not 0 <= grid < 2**31:
            raise LaunchError(f"{name}: a grid of {grid} blocks")
        if shared_bytes > self.runtime.shared_memory:
            raise SharedMemoryError(
                f"{name} wants {shared_bytes} bytes of shared memory; there are {self.runtime.shared_memory}"
            )
        # Tensor maps among the arguments want the alignment that the hardware gives a kernel's parameters.
        buffer = ctypes.create_string_buffer(len(arguments) + 128)
        start = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % 128
        ctypes.memmove(start, arguments, len(arguments))
        with _running:
            self.runtime.launches += 1
            seed = self.runtime.seed * 1_000_003 + self.runtime.launches
            failure = engine().emulator_launch(
                name.encode(),
                self._entry,
                start,
                grid,
                threads,
                shared_bytes,
                seed,
                TIME_LIMIT,
                self.runtime.watches_races,
            )
        if failure is not None:
            raise EmulationError(f"{failure.decode()} (seed {self.runtime.seed}, launch {self.runtime.launches})")


class EmulatorRuntime(DryRuntime):
    """A device of tests, where kernels run: see kernels.cuda.runtime.Runtime.

    `seed` decides when asynchronous copies land, and in what order warps, lanes and blocks run. With `watches_races`
    accesses to shared memory that nothing puts in order end the launch, whatever the order was: see race_check.h.
    """

    def __init__(
        self,
        seed: int = 0,
        shared_memory: int = SHARED_MEMORY,
        capability: tuple[int, int] = (9, 0),
        multiprocessors: int = 4,
        watches_races: bool = False,
    ) -> None:
        super().__init__(DeviceProperties(capability, multiprocessors, shared_memory))
        self.seed = seed
        self.shared_memory = shared_memory
        self.launches = 0
        self.watches_races = watches_races
        self.flags = WATCHED_FLAGS if watches_races else KERNEL_FLAGS
        self.kernels: dict[KernelSource, EmulatedKernel] = {}
        """Every kernel asked for so far."""

    def kernel(self, source: KernelSource, device: torch.device) -> EmulatedKernel:
        if source not in self.kernels:
            engine()
            self.kernels[source] = EmulatedKernel(source, self)
        return self.kernels[source]

    def prepare(self, sources: Iterable[KernelSource], device: torch.device) -> None:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda source: _compile(render(source), source.name, self.flags), sources))

    def tensor_map_encoder(
        self,
        dtype: torch.dtype,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        steps: Sequence[int],
        swizzle: int,
    ) -> Callable[[int], bytes]:
        """As kernels.cuda.tensor_map.encoder, its rules included; read by hopper_engine.h."""
        size = dtype.itemsize
        span = [(count - 1) * step + 1 for count, step in zip(box, steps, strict=True)]
        row = box[0] * size
        legal = (
            all(0 < count < 2**32 for count in sizes)
            and all(stride * size % 16 == 0 and 0 <= stride * size < 2**40 for stride in strides)
            and all(0 < side <= 256 for side in span)
            and all(0 < step <= 8 for step in steps)
            and steps[0] == 1
            and (row % 16 == 0 if swizzle == 0 else row == swizzle)
        )
        byte_strides = [stride * size for stride in strides]

        def map_of(address: int) -> bytes:
            if not legal or address % 16:
                raise KernelError(
                    f"no tensor map: address {address:#x}, {dtype}, sizes {list(sizes)}, strides {list(strides)}, "
                    f"box {list(box)}, steps {list(steps)}, swizzle {swizzle}"
                )
            packed = _PLAIN_MAP.pack(address, _MAP_MAGIC, *byte_strides, *sizes, *box, *steps, swizzle, size)
            return packed.ljust(128, b"\0")

        return map_of


class _Mapping:
    """Frees guarded memory when the buffer over it goes."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size

    def __del__(self) -> None:
        engine().emulator_release(self.address, self.size)


def guarded_empty(shape: Sequence[int], dtype: torch.dtype, at: str = "end") -> torch.Tensor:
    """A contiguous tensor of NaN bytes, before (`at="end"`) or behind (`"start"`) a page whose access ends a launch.

    Its start is aligned to 16 bytes: in the up to 15 bytes between its end and the page only writes are noticed, by the
    next launch to end. What is read there is NaN.
    """
    count = int(torch.Size(shape).numel())
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    address = engine().emulator_guarded(size, at == "end")
    buffer = (ctypes.c_byte * size).from_address(address)
    buffer.mapping = _Mapping(address, size)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(tuple(shape))


def guarded(tensor: torch.Tensor, at: str = "end") -> torch.Tensor:
    """A copy of `tensor`, strides kept, beside a guard page."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = guarded_empty((span,), tensor.dtype, at)
    copy = storage.as_strided(tensor.shape, tensor.stride())
    with torch.no_grad():
        copy.copy_(tensor)
    return copy.requires_grad_(tensor.requires_grad)


class _Guarding(TorchDispatchMode):
    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.namespace == "fastna":  # what the operator allocates inside
            with self:
                return _IMPLEMENTATIONS[func](*args, **kwargs)
        result = func(*args, **kwargs)
        created = func.namespace == "aten" and func.__name__.split(".")[0] in _CREATORS
        if created and isinstance(result, torch.Tensor) and result.is_contiguous() and result.device.type == "cpu":
            memory = guarded_empty(result.shape, result.dtype, self._at)
            return memory.copy_(result) if func.__name__.split(".")[0] not in _UNINITIALISED else memory
        return result


_IMPLEMENTATIONS = {operators.forward: operators._forward, operators.backward: operators._backward}
_UNINITIALISED = {"empty", "empty_like", "new_empty", "empty_strided"}
_CREATORS = _UNINITIALISED | {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"}


@contextmanager
def guarded_allocations(at: str = "end") -> Iterator[None]:
    """Within the block, tensors that are created lie beside a guard page; uninitialised ones hold NaN."""
    with _Guarding(at):
        yield
