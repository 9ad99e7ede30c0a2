"""Tensor maps for Hopper's copy engine (TMA), encoded through libcuda.

A map holds a tensor's address, shape and strides, the box that one copy moves, and how the box is swizzled in shared
memory. The layout of boxes and strides is that of cuTensorMapEncodeTiled in the CUDA driver API.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from kernels.errors import KernelError, MissingComponentError

BYTES = 128
MAX_BOX = 256  # elements along a dimension, steps included
MAX_STEP = 8
_DATA_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTE_TO_256_BYTES = 3


@functools.cache
def _encode() -> ctypes._FuncPointer:
    try:
        return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise MissingComponentError(
            f"the CUDA driver offers no tensor maps ({error}): CUDA 12 or newer is needed"
        ) from error


def encoder(
    dtype: torch.dtype,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    steps: Sequence[int],
    swizzle: int,
) -> Callable[[int], bytes]:
    """A function of an address: the 128 bytes of the map of a tensor of rank 5, innermost dimension first.

    The address is that of the first element, a multiple of 16.

    Args:
        sizes: elements along each dimension.
        strides: elements from one to the next along dimensions 1 to 4; in bytes a multiple of 16.
        box: elements that one copy takes along each dimension.
        steps: elements from one taken to the next, 1 to 8.
        swizzle: bytes of a row of the box, over which 16-byte chunks are swizzled: 32, 64 or 128; 0 for none.

    The function raises KernelError where the driver refuses; the message holds all arguments.
    """
    encode = _encode()
    span = [(count - 1) * step + 1 for count, step in zip(box, steps, strict=True)]
    kind = ctypes.c_int(_DATA_TYPES[dtype]), ctypes.c_uint32(5)
    layout = (
        (ctypes.c_uint64 * 5)(*sizes),
        (ctypes.c_uint64 * 4)(*(stride * dtype.itemsize for stride in strides)),
        (ctypes.c_uint32 * 5)(*span),
        (ctypes.c_uint32 * 5)(*steps),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLES[swizzle]),
        ctypes.c_int(_PROMOTE_TO_256_BYTES),
        ctypes.c_int(0),
    )

    def map_of(address: int) -> bytes:
        buffer = (ctypes.c_uint8 * (2 * BYTES))()
        aligned = -(-ctypes.addressof(buffer) // BYTES) * BYTES
        code = encode(ctypes.c_void_p(aligned), *kind, ctypes.c_void_p(address), *layout)
        if code:
            raise KernelError(
                f"the driver refuses a tensor map (error {code}): address {address:#x}, {dtype}, sizes {list(sizes)}, "
                f"strides {list(strides)}, box {list(box)}, steps {list(steps)}, swizzle {swizzle}"
            )
        return ctypes.string_at(aligned, BYTES)

    return map_of
