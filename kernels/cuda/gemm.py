"""`gemm`: neighborhood attention as three batched GEMMs with fused gather and scatter (arXiv 2403.04690, section 3).

Pointwise-neighbourhood makes the scores and their gradient, neighbourhood-neighbourhood the output and the gradient of
query, inverse neighbourhood the gradients of key and value. A tile is a box of 64 queries or keys inside one dilation
group; it meets a box of keys or queries that starts anywhere. 16-bit types run on the tensor cores; so does float32
where PyTorch allows TF32, and is exact otherwise. The paper has ranks 1 and 2; rank 3 works alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from kernels.cuda.arguments import (
    FLOAT,
    GEOMETRY,
    INT,
    INT64,
    POINTER,
    TENSOR,
    Struct,
    allows_tf32,
    pack_tensor,
    padded_axes,
)
from kernels.cuda.bound import Launch
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.weights import (
    MaterialisedAttention,
    additional_shares,
    geometry_of,
    pack_optional,
    pitch_of,
)
from kernels.problem import Axis, Problem

# As in fastna/gemm_tile.cuh.
TILE = 64
THREADS = 128
RUN = 32
DEPTH = 32
QUERY_BYTES = 56
KEY_BYTES = 32
STAGED_BYTES = THREADS // 32 * 8 * (TILE + 8) * 4
MAX_PART = 128  # channels of the output that one block makes
RESIDENT_LIMIT = 99 << 10  # bytes of shared memory that every device from sm_80 on gives a block

TILES = Struct("GemmTiles", "fastna/gemm_tile.cuh", shape=INT.array(3), count=INT.array(3))
SCORES = Struct(
    "GemmScoresArguments",
    "src/gemm_scores.cuh",
    geometry=GEOMETRY,
    tiles=TILES,
    query=TENSOR,
    key=TENSOR,
    additional=TENSOR,
    weights=POINTER,
    rpb=POINTER,
    statistic=POINTER,
    pitch=INT64,
    channels=INT,
    resident=INT,
)
OUTPUT = Struct(
    "GemmOutputArguments",
    "src/gemm_output.cuh",
    geometry=GEOMETRY,
    tiles=TILES,
    weights=POINTER,
    value=TENSOR,
    additional=TENSOR,
    output=POINTER,
    pitch=INT64,
    channels=INT,
    factor=FLOAT,
)
INVERSE = Struct(
    "GemmInverseArguments",
    "src/gemm_inverse.cuh",
    geometry=GEOMETRY,
    tiles=TILES,
    weights=POINTER,
    source=TENSOR,
    gradient=POINTER,
    pitch=INT64,
    channels=INT,
    factor=FLOAT,
    tokens_per_share=INT,
)
_set_scores = SCORES.pointers()
_set_output = OUTPUT.pointers()
_set_inverse = INVERSE.pointers()


@lru_cache(maxsize=1024)
def tile_shape(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """The box of at most TILE positions that makes the fewest products, each tile counted as full; the widest if equal.

    A box of t positions along an axis meets t + window - 1 keys; so do that many keys of queries, borders aside.
    """
    longest = [axis.group_length(0) for axis in axes]

    def cost(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        tiles = math.prod(-(-length // size) for length, size in zip(longest, shape, strict=True))
        met = math.prod(
            min(size + axis.window - 1, length) for axis, length, size in zip(axes, longest, shape, strict=True)
        )
        return tiles * -(-met // RUN), tuple(-size for size in reversed(shape))

    def shapes(lengths: list[int], room: int) -> Iterator[tuple[int, ...]]:
        if not lengths:
            yield ()
            return
        for size in range(1, min(lengths[0], room) + 1):
            for rest in shapes(lengths[1:], room // size):
                yield size, *rest

    return min(shapes(longest, TILE), key=cost)


@lru_cache(maxsize=1024)
def _tiles_of(problem: Problem) -> tuple[bytes, int]:
    """`GemmTiles`, and how many tiles one head of the whole batch has."""
    axes = padded_axes(problem)
    shape = tile_shape(axes)
    count = [-(-axis.group_length(0) // size) for axis, size in zip(axes, shape, strict=True)]
    groups = math.prod(axis.dilation for axis in axes)
    return TILES.pack(shape=shape, count=count), problem.batch * groups * math.prod(count)


def _part_of(channels: int) -> tuple[int, int]:
    """Channels of one block's output, a multiple of 16, and the parts that cover all of them."""
    parts = -(-channels // MAX_PART)
    return -(-channels // (parts * 16)) * 16, parts


def _blocks_at_once(name: str, dtype: torch.dtype, rank: int, part: int) -> int:
    """Blocks that a multiprocessor shall hold, to hide each other's gathers: as many as spill no registers."""
    narrow = dtype.itemsize == 2
    if name == "scores":
        return (4 if rank == 3 else 5) if narrow else 3
    if part <= 64:
        blocks = 5 if part <= 32 else 4
        return blocks if name == "output" else blocks - 1
    return 3 if narrow and name == "output" else 2


def _source(
    name: str, dtype: torch.dtype, tf32: bool, rank: int, *parameters: object, part: int | None = None
) -> KernelSource:
    """Kernel src/gemm_NAME.cuh for one type and rank; `part` is that of the two sums."""
    camel = f"Gemm{name.capitalize()}"
    leading = () if part is None else (part,)
    config = instantiate(f"{camel}Config", dtype, tf32 and dtype == torch.float32, rank, *leading, *parameters)
    blocks = _blocks_at_once(name, dtype, rank, part or 0)
    return KernelSource(f"src/gemm_{name}.cuh", f"gemm_{name}", config, f"{camel}Arguments", THREADS, blocks)


class Gemm(MaterialisedAttention):
    """Batched products over tiles; the attention weights are gathered and scattered on the way."""

    name = "gemm"

    def scores(self, problem: Problem, mode: str, query: Tensor, key: Tensor, additional: Tensor | None) -> Launch:
        tiles, count = _tiles_of(problem)
        item = problem.dtype.itemsize
        chunk = TILE * (DEPTH * item + 16)
        around = STAGED_BYTES + TILE * (QUERY_BYTES + 3 * KEY_BYTES)
        channels = query.shape[-1]
        resident = -(-channels // DEPTH)
        fits = (2 + resident) * chunk + around <= RESIDENT_LIMIT
        packed = SCORES.pack(
            geometry=geometry_of(problem),
            tiles=tiles,
            query=pack_tensor(query.stride(), problem.rank),
            key=pack_tensor(key.stride(), problem.rank),
            additional=pack_optional(additional),
            pitch=pitch_of(problem),
            channels=channels,
            resident=int(fits),
        )
        source = _source("scores", problem.dtype, allows_tf32(), problem.rank, f"ScoreMode::{mode}")
        shared_bytes = (2 + (resident if fits else 2)) * chunk + around
        return Launch(source, count * problem.heads, shared_bytes, packed, _set_scores)

    def weighted_sum(self, problem: Problem, value: Tensor, additional: Tensor | None, factor: float) -> Launch:
        tiles, count = _tiles_of(problem)
        channels, item = value.shape[-1], problem.dtype.itemsize
        part, parts = _part_of(channels)
        shared = 2 * RUN * (part + 8) * item + 2 * TILE * (RUN * item + 16) + TILE * QUERY_BYTES + 2 * RUN * KEY_BYTES
        packed = OUTPUT.pack(
            geometry=geometry_of(problem),
            tiles=tiles,
            value=pack_tensor(value.stride(), problem.rank),
            additional=pack_optional(additional),
            pitch=pitch_of(problem),
            channels=channels,
            factor=factor,
        )
        source = _source("output", problem.dtype, allows_tf32(), problem.rank, part=part)
        return Launch(source, count * problem.heads * parts, shared, packed, _set_output)

    def inverse_sum(self, problem: Problem, source: Tensor, factor: float) -> Launch:
        return _inverse(problem, source, factor, additional=False)

    def additional_sum(self, problem: Problem, source: Tensor, factor: float) -> Launch:
        return _inverse(problem, source, factor, additional=True)


def _inverse(problem: Problem, source: Tensor, factor: float, additional: bool) -> Launch:
    tiles, count = _tiles_of(problem)
    channels = source.shape[-1]
    part, parts = _part_of(channels)
    shared = 2 * RUN * (part + 8 + TILE + 8) * problem.dtype.itemsize + 2 * RUN * QUERY_BYTES
    blocks = count * problem.key_heads * parts
    shares, tokens = 1, problem.tokens
    if additional:
        blocks = problem.batch * -(-problem.additional // TILE) * problem.key_heads * parts
        shares, tokens = additional_shares(problem, blocks)
    packed = INVERSE.pack(
        geometry=geometry_of(problem),
        tiles=tiles,
        source=pack_tensor(source.stride(), problem.rank),
        pitch=pitch_of(problem),
        channels=channels,
        factor=factor,
        tokens_per_share=tokens,
    )
    kernel = _source("inverse", problem.dtype, allows_tf32(), problem.rank, additional, part=part)
    return Launch(kernel, blocks * shares, shared, packed, _set_inverse, shares)


BACKEND = Gemm()


def representative_sources() -> Iterable[KernelSource]:
    """One of each kernel, type and rank, and the widest of those that keep their sum in registers.

    What it shares with `naive` is counted there.
    """
    kinds = ((torch.float16, False), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True))
    for (dtype, tf32), rank in itertools.product(kinds, (1, 2, 3)):
        for mode in ("SCORE", "WEIGHT", "GRADIENT"):
            yield _source("scores", dtype, tf32, rank, f"ScoreMode::{mode}")
        for part in (32, 64, MAX_PART):
            yield _source("output", dtype, tf32, rank, part=part)
            for additional in (False, True):
                yield _source("inverse", dtype, tf32, rank, additional, part=part)
