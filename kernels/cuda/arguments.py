"""Argument structs of the kernels, packed as a C++ compiler lays them out; what tensors and settings mean to a kernel.

A kernel takes one struct by value. `Struct` names its fields in the order of the C++ declaration; offsets follow from
natural alignment, and a test compares every registered struct with `offsetof` and `sizeof`. Packing is done once per
problem and set of strides; a call only writes the pointers over a copy of those bytes:

    FLASH_FORWARD = Struct("FlashForwardArguments", geometry=GEOMETRY, query=TENSOR, ..., lse=TENSOR, rpb=POINTER)
    packed = FLASH_FORWARD.pack(geometry=pack_geometry(problem), query=pack_tensor(query.stride(), problem.rank), ...)
    set_pointers = FLASH_FORWARD.pointers()
    kernel.launch(grid, shared_bytes, set_pointers(packed, *map(address, (query, key, ..., rpb))))

`kernels.cuda.bound.Launch` does the last line, with all worked out beforehand that depends on no address.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.problem import MAX_RANK, Axis, Problem


class Field:
    """A field's type: a plain C++ type, or an array of `count` of them."""

    def __init__(self, cxx: str, code: str, count: int = 1) -> None:
        self.cxx = cxx
        self.count = count
        self._code = code
        self.format = code * count
        self._packer = struct.Struct("<" + self.format)
        self.size: int = self._packer.size
        self.alignment: int = self.size // count

    def array(self, count: int) -> Field:
        return Field(self.cxx, self._code, count)

    def pack(self, value: Any) -> bytes:
        return self._packer.pack(*(value if self.count > 1 else (value,)))


class Opaque(Field):
    """A field of `size` bytes that somebody else fills in, at every call: like a pointer, but given as bytes."""

    def __init__(self, cxx: str, size: int) -> None:
        self.cxx = cxx
        self.count = 1
        self.format = f"{size}s"
        self._packer = struct.Struct("<" + self.format)
        self.size = self.alignment = size


POINTER = Field("void*", "Q")
INT64 = Field("long long", "q")
INT = Field("int", "i")
UINT = Field("unsigned int", "I")
FLOAT = Field("float", "f")


class Struct:
    """A C++ struct in namespace fastna: its fields in order, with the offsets that a compiler gives them."""

    registered: ClassVar[dict[str, Struct]] = {}
    """All of them by C++ name; a test compares each with a compiler's layout."""

    def __init__(
        self, name: str, header: str = "fastna/arguments.cuh", **fields: Field | Struct | tuple[Struct, int]
    ) -> None:
        self.name = name
        self.header = header
        self.offsets: dict[str, int] = {}
        self._fields: dict[str, tuple[Field | Struct, int, int]] = {}
        self.alignment: int = 1
        end = 0
        for field_name, declared in fields.items():
            kind, count = declared if isinstance(declared, tuple) else (declared, 1)
            offset = _align(end, kind.alignment)
            self._fields[field_name] = (kind, count, offset)
            self.offsets[field_name] = offset
            if isinstance(kind, Struct):
                for index in range(count):
                    prefix = field_name if count == 1 else f"{field_name}[{index}]"
                    base = offset + index * kind.size
                    self.offsets |= {f"{prefix}.{inner}": base + at for inner, at in kind.offsets.items()}
            end = offset + count * kind.size
            self.alignment = max(self.alignment, kind.alignment)
        self.size: int = _align(end, self.alignment)
        self.registered[name] = self

    def pack(self, **values: Any) -> bytes:
        """The struct's bytes. Nested structs are given packed (an array of them: a sequence).

        Pointers and opaque fields, which calls write, are null by default.

        Raises KeyError for an unknown field, TypeError for one that is missing or has another size, OverflowError for a
        number that its type does not hold.
        """
        if unknown := values.keys() - self._fields.keys():
            raise KeyError(f"{self.name} has no field {sorted(unknown)}; it has {list(self._fields)}")
        buffer = bytearray(self.size)
        for name, (kind, count, offset) in self._fields.items():
            if name not in values:
                if not _is_written_by_calls(kind):
                    raise TypeError(f"{self.name}.{name} needs a value")
                continue
            if isinstance(kind, Field):
                try:
                    packed = kind.pack(values[name])
                except struct.error as error:
                    raise OverflowError(f"{self.name}.{name}: {values[name]} is no {kind.cxx} ({error})") from error
            else:
                packed = b"".join(values[name]) if count > 1 else values[name]
            if len(packed) != count * kind.size:
                raise TypeError(f"{self.name}.{name} takes {count * kind.size} bytes, not {len(packed)}")
            buffer[offset : offset + len(packed)] = packed
        return bytes(buffer)

    def pointers(self, *names: str) -> Pointers:
        """The named pointers and opaque fields, or all, in order of declaration: what calls write.

        A name may be dotted: `"query.data"`. Raises ValueError for names in another order.
        """
        written = self._written_by_calls()
        places = [(self.offsets[name], written[name]) for name in names or written]
        if places != sorted(places, key=lambda place: place[0]):
            raise ValueError(f"{self.name} declares {names} in another order")
        return Pointers(places, self.size)

    def _written_by_calls(self) -> dict[str, Field]:
        found: dict[str, Field] = {}
        for name, (kind, count, _) in self._fields.items():
            if isinstance(kind, Struct):
                inner = kind._written_by_calls()
                for prefix in [name] if count == 1 else [f"{name}[{index}]" for index in range(count)]:
                    found |= {f"{prefix}.{inner_name}": field for inner_name, field in inner.items()}
            elif _is_written_by_calls(kind):
                found[name] = kind
        return found


def _is_written_by_calls(kind: Field | Struct) -> bool:
    return kind is POINTER or isinstance(kind, Opaque)


class Pointers:
    """The places in a struct where calls write addresses (and bytes, where a field is opaque).

    `pointers(packed, *addresses)` are the bytes `packed` with addresses written over them. That is all that a call does
    to its arguments, so it is one packing, `pointers.pack(*values)`, of addresses and the stretches of bytes between
    them: `values` is `pointers.template(packed)` with addresses at its odd places.
    """

    def __init__(self, places: Sequence[tuple[int, Field]], size: int) -> None:
        self._starts = [0, *(offset + field.size for offset, field in places)]
        self._ends = [*(offset for offset, _ in places), size]
        lengths = [f"{end - start}s" for start, end in zip(self._starts, self._ends, strict=True)]
        formats = [*(field.format for _, field in places), ""]
        self.pack = struct.Struct("<" + "".join(map("".join, zip(lengths, formats, strict=True)))).pack
        self.template = functools.lru_cache(maxsize=4096)(self._template)

    def _template(self, packed: bytes) -> list[Any]:
        values: list[Any] = [0] * (2 * len(self._starts) - 1)
        values[::2] = [packed[start:end] for start, end in zip(self._starts, self._ends, strict=True)]
        return values

    def __call__(self, packed: bytes, *addresses: int | bytes) -> bytes:
        values = self.template(packed).copy()
        values[1::2] = addresses
        return self.pack(*values)


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


AXIS = Struct("AxisArguments", length=INT, window=INT, dilation=INT, stride=INT, causal=INT)
TENSOR = Struct("TensorArguments", data=POINTER, batch=INT64, axis=INT64.array(MAX_RANK), head=INT64)
GEOMETRY = Struct("Geometry", axis=(AXIS, MAX_RANK), batch=INT, heads=INT, key_heads=INT, additional=INT, scale=FLOAT)

MAP_LIMIT = 2**31
"""Elements from the first to the last token of a map that kernels may count in an int."""
TENSOR_LIMIT = 2**34
"""Elements from the first map of a tensor to the last: some kernels count chunks of 8 elements in 32 bits."""

PADDING_AXIS = Axis(length=1, window=1)


def padded_axes(problem: Problem) -> tuple[Axis, ...]:
    """The problem's axes behind leading axes of length 1, three in all: what every kernel sees."""
    return (PADDING_AXIS,) * (MAX_RANK - problem.rank) + problem.axes


def pack_axis(axis: Axis) -> bytes:
    return AXIS.pack(
        length=axis.length, window=axis.window, dilation=axis.dilation, stride=axis.stride, causal=int(axis.causal)
    )


def pack_geometry(problem: Problem) -> bytes:
    return GEOMETRY.pack(
        axis=[pack_axis(axis) for axis in padded_axes(problem)],
        batch=problem.batch,
        heads=problem.heads,
        key_heads=problem.key_heads,
        additional=problem.additional,
        scale=problem.scale,
    )


def pack_tensor(strides: Sequence[int], rank: int) -> bytes:
    """TensorArguments of a tensor `[batch, *space, heads, ...]` with `rank` axes of space, its pointer null.

    `strides` are the tensor's, in elements; one for the channels may follow and is not looked at. lse has none;
    additional keys `[batch, additional, key_heads, head_dim]` are a tensor of rank 1.
    """
    batch, *space, head = strides[: rank + 2]
    return TENSOR.pack(batch=batch, axis=(0,) * (MAX_RANK - rank) + tuple(space), head=head)


def pack_contiguous(problem: Problem, heads: int, channels: int) -> bytes:
    """TensorArguments of a contiguous tensor `[batch, *space, heads, channels]`; lse has one channel."""
    strides, step = [], channels
    for size in (heads, *reversed(problem.space)):
        strides.append(step)
        step *= size
    return pack_tensor((step, *reversed(strides)), problem.rank)


def address(tensor: Tensor | None) -> int:
    """What a kernel gets for a tensor: null for none."""
    return 0 if tensor is None else tensor.data_ptr()


def alignment(*tensors: Tensor) -> int:
    """Bytes, at most 16, that the address of every token and head of every tensor is a multiple of."""
    bits = 16
    for tensor in tensors:
        bits |= tensor.data_ptr()
        for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False):
            if size > 1:
                bits |= stride * tensor.element_size()
    return bits & -bits


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where 16-byte copies can read it, else a contiguous copy."""
    return tensor if alignment(tensor) == 16 else tensor.clone(memory_format=torch.contiguous_format)


def why_not_near(**tensors: Tensor) -> str | None:
    """Why 16-byte copies and 32-bit offsets within a map do not reach every token, in one sentence; None if they do."""
    for name, tensor in tensors.items():
        where = f"{name} at address {tensor.data_ptr():#x} with strides {tensor.stride()}"
        if alignment(tensor) < 16:
            return f"{where} is not aligned to 16 bytes"
        batch, *space, _, channels = [
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        if sum(space) + channels >= MAP_LIMIT or batch >= TENSOR_LIMIT:
            return f"{where} has tokens of a map {MAP_LIMIT} elements apart, or maps {TENSOR_LIMIT}"
    return None


def allows_tf32() -> bool:
    """Whether PyTorch lets float32 products round their operands to TF32; its older switches set the same value."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
