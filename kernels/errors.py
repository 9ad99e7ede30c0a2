"""What can go wrong between a kernel's source and its result: always an exception, never an output left unwritten."""

from __future__ import annotations


class KernelError(RuntimeError):
    """Any failure to compile, load or run a kernel."""


class CompilationError(KernelError):
    """The compiler rejected a kernel; the message holds its log."""


class MissingComponentError(KernelError, ImportError):
    """CuPy, NVRTC or the driver is not there, or too old."""


class UnsupportedDeviceError(KernelError):
    """The device is no CUDA device of compute capability 8.0 or newer, or NVRTC does not know it."""


class LaunchError(KernelError):
    """The driver refused a launch, or a kernel failed while it ran."""


class SharedMemoryError(LaunchError):
    """A kernel wants more shared memory per block than the device has."""
