"""`naive`: one thread per score and per element of output, the way before arXiv 2403.04690.

Every thread finds its own window and reads what it needs from global memory; nothing is tiled. Channels are read 16
bytes at a time in scores and four at a time (two halves) elsewhere. kernels/cuda/weights.py has the order of kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from kernels.cuda import runtime
from kernels.cuda.arguments import FLOAT, GEOMETRY, INT, INT64, POINTER, TENSOR, Struct, address, pack_tensor
from kernels.cuda.jit import KernelSource, instantiate
from kernels.cuda.weights import (
    CHUNKS,
    ELEMENT_THREADS,
    MaterialisedAttention,
    additional_shares,
    chunks_of,
    columns_of,
    geometry_of,
    pack_optional,
    pitch_of,
    representative_weights_sources,
    strides_of,
)
from kernels.problem import Problem

SCORES = Struct(
    "NaiveScoresArguments",
    "src/naive_scores.cuh",
    geometry=GEOMETRY,
    query=TENSOR,
    key=TENSOR,
    additional=TENSOR,
    weights=POINTER,
    rpb=POINTER,
    statistic=POINTER,
    pitch=INT64,
    channels=INT,
    chunks=CHUNKS,
)
OUTPUT = Struct(
    "NaiveOutputArguments",
    "src/naive_output.cuh",
    geometry=GEOMETRY,
    weights=POINTER,
    value=TENSOR,
    additional=TENSOR,
    output=POINTER,
    pitch=INT64,
    factor=FLOAT,
    chunks=CHUNKS,
)
INVERSE = Struct(
    "NaiveInverseArguments",
    "src/naive_inverse.cuh",
    geometry=GEOMETRY,
    weights=POINTER,
    source=TENSOR,
    gradient=POINTER,
    pitch=INT64,
    factor=FLOAT,
    chunks=CHUNKS,
)
ADDITIONAL = Struct(
    "NaiveAdditionalArguments",
    "src/naive_additional.cuh",
    geometry=GEOMETRY,
    weights=POINTER,
    source=TENSOR,
    partials=POINTER,
    pitch=INT64,
    factor=FLOAT,
    tokens_per_share=INT,
    chunks=CHUNKS,
)
_set_scores = SCORES.pointers()
_set_output = OUTPUT.pointers()
_set_inverse = INVERSE.pointers()
_set_additional = ADDITIONAL.pointers()


def _source(name: str, dtype: torch.dtype, rank: int, *parameters: object) -> KernelSource:
    """Kernel src/naive_NAME.cuh for one type and rank."""
    camel = f"Naive{name.capitalize()}"
    config = instantiate(f"{camel}Config", dtype, rank, *parameters, ELEMENT_THREADS)
    return KernelSource(f"src/naive_{name}.cuh", f"naive_{name}", config, f"{camel}Arguments", ELEMENT_THREADS)


_Strides = tuple[int, ...]
_Plan = tuple[KernelSource, int, bytes]  # kernel, grid, arguments without pointers


@lru_cache(maxsize=1024)
def _scores_plan(
    problem: Problem, mode: str, query: _Strides, key: _Strides, additional: _Strides | None, channels: int
) -> _Plan:
    chunks, grid = chunks_of(problem.batch, problem.tokens * problem.heads, columns_of(problem))
    packed = SCORES.pack(
        geometry=geometry_of(problem),
        query=pack_tensor(query, problem.rank),
        key=pack_tensor(key, problem.rank),
        additional=pack_optional(additional),
        pitch=pitch_of(problem),
        channels=channels,
        chunks=chunks,
    )
    return _source("scores", problem.dtype, problem.rank, f"ScoreMode::{mode}"), grid, packed


@lru_cache(maxsize=1024)
def _output_plan(problem: Problem, value: _Strides, additional: _Strides | None, channels: int, factor: float) -> _Plan:
    words = channels * problem.dtype.itemsize // 4
    chunks, grid = chunks_of(problem.batch, problem.tokens * problem.heads, words)
    packed = OUTPUT.pack(
        geometry=geometry_of(problem),
        value=pack_tensor(value, problem.rank),
        additional=pack_optional(additional),
        pitch=pitch_of(problem),
        factor=factor,
        chunks=chunks,
    )
    return _source("output", problem.dtype, problem.rank), grid, packed


@lru_cache(maxsize=1024)
def _inverse_plan(problem: Problem, source: _Strides, channels: int, factor: float) -> _Plan:
    words = channels * problem.dtype.itemsize // 4
    chunks, grid = chunks_of(problem.batch, problem.tokens * problem.key_heads, words)
    packed = INVERSE.pack(
        geometry=geometry_of(problem),
        source=pack_tensor(source, problem.rank),
        pitch=pitch_of(problem),
        factor=factor,
        chunks=chunks,
    )
    return _source("inverse", problem.dtype, problem.rank), grid, packed


@lru_cache(maxsize=1024)
def _additional_plan(
    problem: Problem, source: _Strides, channels: int, factor: float
) -> tuple[KernelSource, int, int, bytes]:
    """The kernel, its grid, the number of shares, and the arguments."""
    rows = problem.additional * problem.key_heads
    shares, tokens = additional_shares(problem, chunks_of(problem.batch, rows, channels)[1])
    chunks, grid = chunks_of(shares * problem.batch, rows, channels)
    packed = ADDITIONAL.pack(
        geometry=geometry_of(problem),
        source=pack_tensor(source, problem.rank),
        pitch=pitch_of(problem),
        factor=factor,
        tokens_per_share=tokens,
        chunks=chunks,
    )
    return _source("additional", problem.dtype, problem.rank), grid, shares, packed


class Naive(MaterialisedAttention):
    """One thread per score, one thread per four bytes of output or gradient."""

    name = "naive"

    def scores(
        self,
        problem: Problem,
        mode: str,
        query: Tensor,
        key: Tensor,
        additional: Tensor | None,
        weights: Tensor,
        rpb: Tensor | None,
        statistic: Tensor | None,
    ) -> None:
        source, grid, packed = _scores_plan(
            problem, mode, query.stride(), key.stride(), strides_of(additional), query.shape[-1]
        )
        arguments = _set_scores(packed, *map(address, (query, key, additional, weights, rpb, statistic)))
        runtime.kernel(source, problem.device).launch(grid, 0, arguments)

    def weighted_sum(
        self, problem: Problem, weights: Tensor, value: Tensor, additional: Tensor | None, factor: float
    ) -> Tensor:
        channels = value.shape[-1]
        output = value.new_empty((problem.batch, *problem.space, problem.heads, channels))
        source, grid, packed = _output_plan(problem, value.stride(), strides_of(additional), channels, factor)
        arguments = _set_output(packed, *map(address, (weights, value, additional, output)))
        runtime.kernel(source, problem.device).launch(grid, 0, arguments)
        return output

    def inverse_sum(self, problem: Problem, weights: Tensor, source: Tensor, factor: float) -> Tensor:
        channels = source.shape[-1]
        gradient = source.new_empty((problem.batch, *problem.space, problem.key_heads, channels))
        kernel, grid, packed = _inverse_plan(problem, source.stride(), channels, factor)
        arguments = _set_inverse(packed, *map(address, (weights, source, gradient)))
        runtime.kernel(kernel, problem.device).launch(grid, 0, arguments)
        return gradient

    def additional_sum(self, problem: Problem, weights: Tensor, source: Tensor, factor: float) -> Tensor:
        channels = source.shape[-1]
        kernel, grid, shares, packed = _additional_plan(problem, source.stride(), channels, factor)
        shape = (shares, problem.batch, problem.additional, problem.key_heads, channels)
        partials = source.new_empty(shape, dtype=torch.float32)
        arguments = _set_additional(packed, *map(address, (weights, source, partials)))
        runtime.kernel(kernel, problem.device).launch(grid, 0, arguments)
        return partials.sum(0).to(source.dtype)


BACKEND = Naive()


def representative_sources() -> Iterable[KernelSource]:
    """One of each kernel and type, for scripts/compile_kernels.py."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rank in (1, 2, 3):
            for mode in ("SCORE", "WEIGHT", "GRADIENT"):
                yield _source("scores", dtype, rank, f"ScoreMode::{mode}")
            for name in ("output", "inverse", "additional"):
                yield _source(name, dtype, rank)
            yield from representative_weights_sources(dtype, rank)
