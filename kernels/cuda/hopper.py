"""`hopper`: large windows on sm_90a, forward. Tensor copies and wgmma; see src/hopper_forward.cuh.

Tile boxes are chosen per problem by the one thing that decides here: how many (query, key) pairs they multiply in all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Operands
from kernels.cuda import arguments, runtime, tensor_map
from kernels.cuda.arguments import GEOMETRY, INT, MAX_RANK, POINTER, TENSOR, Opaque, Struct
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Axis, Problem

TENSOR_MAP = Opaque("TensorMap", tensor_map.BYTES)
HOPPER_FORWARD = Struct(
    "HopperForwardArguments",
    header="src/hopper_forward.cuh",
    query=TENSOR_MAP,
    key=TENSOR_MAP,
    value=TENSOR_MAP,
    output=TENSOR,
    lse=POINTER,
    geometry=GEOMETRY,
    tiles=INT.array(MAX_RANK),
)
_set_pointers = HOPPER_FORWARD.pointers("output.data", "lse")

ARCHITECTURES = ("sm_90a",)
SHARED_LIMIT = 227 << 10
QUERIES = 64  # of one warpgroup
STEP_PAIRS = 12  # what a box costs besides its pairs, in keys
SMALLEST_WINDOW = 128  # keys; below, the softmax of tiles that are mostly masked costs more than the other families


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries of a warpgroup, warpgroups and keys of a box along each of three axes, and stages of keys."""

    queries: tuple[int, int, int]
    warpgroups: tuple[int, int, int]
    keys: tuple[int, int, int]
    stages: int
    resident: int = 1
    """Blocks that an SM holds at once."""

    @property
    def block(self) -> tuple[int, ...]:
        """Queries of one block along each axis."""
        return tuple(q * w for q, w in zip(self.queries, self.warpgroups, strict=True))

    def shared_bytes(self, head_dim: int) -> int:
        groups = math.prod(self.warpgroups)
        barriers = 8 * (1 + 4 * self.stages)
        tiles = (groups * QUERIES + 2 * self.stages * math.prod(self.keys)) * head_dim * 2
        return tiles + barriers + groups * 3 * QUERIES * 8

    def source(self, dtype: torch.dtype, head_dim: int) -> KernelSource:
        groups = math.prod(self.warpgroups)
        threads = 128 * (1 + groups)
        # The copying warpgroup keeps 24 registers per thread; the others share the rest of the block's.
        share = 65536 // (threads * self.resident) // 8 * 8
        registers = min((share * (1 + groups) - 24) // groups // 8 * 8, 240)
        boxes = (*self.queries, *self.warpgroups, *self.keys)
        config = instantiate("HopperConfig", dtype, head_dim, *boxes, self.stages, registers)
        return KernelSource(
            "src/hopper_forward.cuh",
            "hopper_forward",
            config,
            "HopperForwardArguments",
            threads,
            self.resident,
        )


def most_keys(head_dim: int) -> tuple[int, int]:
    """Warpgroups of a block and the largest box of keys that fits registers and, in two stages, shared memory."""
    if head_dim <= 64:
        return 3, 112
    if head_dim <= 128:
        return 2, 176
    return 2, 80 if head_dim <= 192 else 64


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve the forward pass, in one sentence; None where it does."""
    reason = runtime.why_not_here(problem)
    if reason:
        return reason
    if runtime.properties(problem.device).capability != (9, 0):
        return "it needs compute capability 9.0"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {problem.dtype}"
    if problem.head_dim != problem.value_dim or problem.head_dim % 16 or problem.head_dim > 256:
        return f"it takes one head_dim, a multiple of 16 up to 256, not {problem.head_dim} and {problem.value_dim}"
    if problem.has_rpb or problem.additional:
        return "it takes neither a bias nor additional keys"
    if problem.scale <= 0:
        return f"it takes a positive scale, not {problem.scale}"
    if problem.window_size < SMALLEST_WINDOW:
        return f"it is for windows of at least {SMALLEST_WINDOW} keys, not {problem.window_size}"
    if max(problem.dilation) > tensor_map.MAX_STEP:
        return f"it takes dilations up to {tensor_map.MAX_STEP}, not {problem.dilation}"
    return None


def why_not_operands(problem: Problem, operands: Operands) -> str | None:
    """Why tensor copies cannot read these tensors: alignment, or heads that do not lie within one token."""
    for name, tensor in (("query", operands.query), ("key", operands.key), ("value", operands.value)):
        *outer, head, _ = tensor.stride()
        steps = [step for step, size in zip(outer, tensor.shape, strict=False) if size > 1]
        width = (tensor.shape[-2] - 1) * head + tensor.shape[-1]
        if tensor.data_ptr() % 16 or any(step * tensor.element_size() % 16 for step in (*steps, head)):
            return f"{name} is not aligned to 16 bytes"
        if (tensor.shape[-2] > 1 and head != problem.head_dim) or any(step < width for step in steps):
            return f"{name} has heads that do not follow each other within a token"
    return None


def _along(axis: Axis, queries: int, warpgroups: int, keys: int) -> int:
    """Pairs that warpgroups multiply along one axis: each visits the boxes that meet its own windows.

    Boxes start where the union of the block's windows does, so a warpgroup behind the first may visit one more.
    """
    total = 0
    for length in {axis.group_length(group) for group in range(axis.dilation)}:
        groups = sum(axis.group_length(group) == length for group in range(axis.dilation))
        for block in range(0, length, queries * warpgroups):
            start = axis.window_at(block, length)[0]
            for first in range(block, min(block + queries * warpgroups, length), queries):
                last = min(first + queries, length) - 1
                skipped = (axis.window_at(first, length)[0] - start) // keys
                boxes = -(-(axis.window_at(last, length)[1] - start) // keys) - skipped
                total += groups * boxes * keys * queries
    return total


def _boxes(count: int, exact: bool, axes: tuple[Axis, ...], multiple: int) -> Iterator[tuple[int, int, int]]:
    """Boxes of `count` (or at most so many) tokens, along the last axis a multiple of `multiple`."""
    flat = [axis.length == 1 for axis in axes]
    for first in range(1, 2 if flat[0] else min(count, 32) + 1):
        for second in range(1, 2 if flat[1] else count // first + 1):
            for third in range(multiple, count // (first * second) + 1, multiple):
                size = first * second * third
                if size == count if exact else size % 16 == 0 and 2 * size > count:
                    yield first, second, third


@functools.lru_cache(maxsize=512)
def choose_tiles(axes: tuple[Axis, ...], groups: int, most: int, stages: int = 2, resident: int = 1) -> Tiles:
    """The boxes of `groups` warpgroups and up to `most` keys that multiply the fewest pairs; `axes` are padded to three."""
    along = functools.cache(_along)
    limits = [tensor_map.MAX_BOX // axis.dilation for axis in axes]
    keys = [
        box for box in _boxes(most, False, axes, 8) if all(b <= limit for b, limit in zip(box, limits, strict=True))
    ]
    best: tuple[float, Tiles] | None = None
    sides = range(1, groups + 1)
    arrangements = [(a, b, c) for a, b, c in itertools.product(sides, repeat=3) if a * b * c == groups]
    for queries in _boxes(QUERIES, True, axes, 1):
        if any(side & (side - 1) for side in queries):
            continue
        for warpgroups in arrangements:
            block = [q * w for q, w in zip(queries, warpgroups, strict=True)]
            if any(side > max(axis.length, 1) and w > 1 for side, axis, w in zip(block, axes, warpgroups, strict=True)):
                continue
            for box in keys:
                shapes = zip(axes, queries, warpgroups, box, strict=True)
                cost = math.prod(along(*shape) for shape in shapes) * (1 + STEP_PAIRS / math.prod(box))
                if best is None or cost < best[0]:
                    best = cost, Tiles(queries, warpgroups, box, stages, resident)
    if best is None:
        queries = next(box for box in _boxes(QUERIES, True, axes, 1) if not any(side & (side - 1) for side in box))
        return Tiles(queries, (1, 1, groups), keys[-1], stages, resident)
    return best[1]


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, output_strides: tuple[int, ...]) -> tuple[KernelSource, int, int, bytes, Tiles]:
    axes = arguments.padded_axes(problem)
    tiles = choose_tiles(axes, *most_keys(problem.head_dim))
    counts = [-(-axis.group_length(0) // block) for axis, block in zip(axes, tiles.block, strict=True)]
    grid = math.prod(counts) * math.prod(problem.dilation) * problem.heads * problem.batch
    packed = HOPPER_FORWARD.pack(
        query=b"",
        key=b"",
        value=b"",
        output=arguments.pack_tensor(output_strides, problem.rank),
        geometry=arguments.pack_geometry(problem),
        tiles=counts,
    )
    source = tiles.source(problem.dtype, problem.head_dim)
    return source, grid, tiles.shared_bytes(problem.head_dim), packed, tiles


@functools.lru_cache(maxsize=4096)
def _map(
    device: torch.device,
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, int, int],
    dilation: tuple[int, ...],
) -> bytes:
    """The map of a tensor `[batch, *space, heads, head_dim]` for copies of a box of tokens and a slice of a head."""
    rank = len(shape) - 3
    head_dim = shape[-1]
    row = 128 if head_dim % 64 == 0 else 64 if head_dim % 32 == 0 else 32
    padding = MAX_RANK - rank
    batch_stride = strides[0] if shape[0] > 1 else max(strides[0], 8)
    sizes = [(shape[-2] - 1) * strides[-2] + head_dim, *reversed(shape[1:-2]), *(1,) * padding, shape[0]]
    steps = [1, *reversed(dilation), *(1,) * padding, 1]
    outer = [*reversed(strides[1:-2]), *(batch_stride,) * padding, batch_stride]
    return runtime.encode_tensor_map(device, address, dtype, sizes, outer, (row // 2, *reversed(box), 1), steps, row)


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    query = operands.query
    shape = query.shape[:-1]
    output = query.new_empty((*shape, problem.value_dim))
    lse = query.new_empty(shape, dtype=torch.float32)
    source, grid, shared_bytes, packed, tiles = _plan(problem, output.stride())
    maps = b"".join(
        _map(
            tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), box, problem.dilation
        )
        for tensor, box in ((query, tiles.queries), (operands.key, tiles.keys), (operands.value, tiles.keys))
    )
    packed = maps + packed[len(maps) :]
    kernel = runtime.kernel(source, problem.device)
    kernel.launch(grid, shared_bytes, _set_pointers(packed, output.data_ptr(), lse.data_ptr()))
    return output, lse


def representative_sources() -> Iterable[KernelSource]:
    """One configuration per rank and class of head_dim, for the compile check; sm_90a only."""
    flat, square, cube = (1, 1, 64), (1, 8, 8), (8, 8, 1)
    shapes = [
        (32, square, (1, 14, 8)),
        (64, square, (1, 14, 8)),
        (128, square, (1, 22, 8)),
        (128, flat, (1, 1, 176)),
        (128, cube, (6, 1, 24)),
        (192, square, (1, 10, 8)),
        (256, square, (1, 8, 8)),
    ]
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim, queries, keys in shapes:
            yield Tiles(queries, (1, 1, most_keys(head_dim)[0]), keys, 2).source(dtype, head_dim)
