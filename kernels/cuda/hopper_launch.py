"""Launches of the Hopper kernels: their sources, tensor maps, and arguments that begin with maps.

A map holds its tensor's address, so a call with a tensor elsewhere needs another map. All else in it is worked out when
a call is bound (kernels/calls.py): then a new address costs one call of the driver, and one of the last few nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from kernels.cuda import runtime, tensor_map
from kernels.cuda.arguments import MAX_RANK, Opaque, Pointers, Struct, pack_geometry, padded_axes
from kernels.cuda.bound import Launch
from kernels.cuda.hopper_tiles import Bias, Tiles
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Problem

TENSOR_MAP = Opaque("TensorMap", tensor_map.BYTES)

KEPT_MAPS = 64
"""Of each tensor of a kind of call: an allocator gives the layers of a model the same few addresses every time."""

MapOf = Callable[[int], bytes]
"""The bytes of a tensor map, by the tensor's address."""


def source_of(name: str, tiles: Tiles, *config: object) -> KernelSource:
    """The kernel of src/NAME.cuh, with these template arguments, for blocks of `tiles`."""
    cxx = name.title().replace("_", "")
    return KernelSource(
        f"src/{name}.cuh", name, instantiate(f"{cxx}Config", *config), f"{cxx}Arguments", tiles.threads, tiles.resident
    )


def extras_config(bias: Bias | None, additional: bool = False) -> list[object]:
    """The last template arguments of a kernel that may have a bias and additional keys: no more than it needs."""
    config: list[object] = [] if bias is None and not additional else ["NoBias" if bias is None else bias.config]
    return [*config, True] if additional else config


def launch_of(
    problem: Problem,
    arguments: Struct,
    pointers: Pointers,
    source: KernelSource,
    tiles: Tiles,
    heads: int,
    shared_bytes: int,
    bias: Bias | None,
    **tensors: bytes,
) -> Launch:
    """A launch of blocks of `tiles` over all dilation groups of `heads` heads.

    `shared_bytes`: of a block, but for a bias. `tensors`: those of the arguments that have strides.
    """
    counts = tiles.counts(padded_axes(problem))
    grid = math.prod(counts) * math.prod(problem.dilation) * heads * problem.batch
    packed = arguments.pack(geometry=pack_geometry(problem), tiles=counts, **tensors)
    table = 0 if bias is None else bias.bytes(tiles.rows, tiles.columns)
    return Launch(source, grid, shared_bytes + table, packed, pointers)


def bind(launch: Launch, problem: Problem, maps: Sequence[MapOf]) -> Callable[..., None]:
    """A function of addresses: of the tensors that `maps` are of, then of those that a kernel has pointers to."""
    start, mapped = launch.bind(problem.device), len(maps)

    def run(*addresses: int) -> None:
        start(*[map_of(address) for map_of, address in zip(maps, addresses, strict=False)], *addresses[mapped:])

    return run


def map_box(problem: Problem, tensor: Tensor, box: tuple[int, int, int]) -> MapOf:
    """Maps for copies of a box of tokens of `[batch, *space, heads, channels]` and a slice of a head's channels.

    Of `tensor` and all that lie like it; it may be a meta tensor.
    """
    return _map(problem, tensor, box, problem.dilation)


def map_additional(problem: Problem, tensor: Tensor | None, tiles: Tiles) -> MapOf:
    """Maps of additional keys or values, whose box is a row of as many tokens as one of columns has; or none."""
    return no_map if tensor is None else _map(problem, tensor, (1, 1, math.prod(tiles.columns)), (1,))


def map_row_blocks(
    problem: Problem, tensor: Tensor, columns: int, entries: int = 1, *, column_by_column: bool = False
) -> MapOf:
    """Maps for copies of 8 rows by `columns` columns of one head of `[batch, rows, columns, heads, channels]`, of as
    many batch entries; rows and columns of one dilation group.

    In shared memory tokens lie row by row, and a place is (channel, column, row, 0, batch); or column by column, and it
    is (channel, row, column, 0, batch). The head is in the channel.
    """
    batch, rows, width, heads, channels = tensor.shape
    steps = tensor.stride()
    batch_step = steps[0] if batch > 1 else max(steps[0], 8)
    row_step, column_step = problem.dilation
    axes = [(width, steps[2], columns, column_step), (rows, steps[1], 8, row_step)]
    inner, outer = reversed(axes) if column_by_column else axes
    sizes = [(heads - 1) * steps[3] + channels, inner[0], outer[0], 1, batch]
    strides = [inner[1], outer[1], batch_step, batch_step]
    box, taken = (channels, inner[2], outer[2], 1, entries), (1, inner[3], outer[3], 1, 1)
    swizzle = channels * tensor.element_size()
    encode = runtime.tensor_map_encoder(problem.device, tensor.dtype, sizes, strides, box, taken, swizzle)
    return functools.lru_cache(maxsize=KEPT_MAPS)(encode)


def no_map(address: int) -> bytes:
    """For a kernel that reads no such tensor."""
    return b""


def _map(problem: Problem, tensor: Tensor, box: tuple[int, int, int], dilation: Sequence[int]) -> MapOf:
    shape, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
    channels = shape[-1]
    row = next(size for size in (128, 64, 32, 16) if channels * dtype.itemsize % size == 0)
    padding = MAX_RANK - (len(shape) - 3)
    batch_stride = strides[0] if shape[0] > 1 else max(strides[0], 8)
    sizes = [(shape[-2] - 1) * strides[-2] + channels, *reversed(shape[1:-2]), *(1,) * padding, shape[0]]
    steps = [1, *reversed(dilation), *(1,) * padding, 1]
    outer = [*reversed(strides[1:-2]), *(batch_stride,) * padding, batch_stride]
    slice_box = (row // dtype.itemsize, *reversed(box), 1)
    swizzle = row if row > 16 else 0
    encode = runtime.tensor_map_encoder(problem.device, dtype, sizes, outer, slice_box, steps, swizzle)
    return functools.lru_cache(maxsize=KEPT_MAPS)(encode)
