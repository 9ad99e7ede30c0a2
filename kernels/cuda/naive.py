"""`naive`: one thread per score and per element of output, the way before arXiv 2403.04690.

Every thread finds its own window and reads what it needs from global memory; nothing is tiled. Channels are read 16
bytes at a time in scores and four at a time (two halves) elsewhere. kernels/cuda/weights.py has the order of kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.cuda.arguments import FLOAT, GEOMETRY, INT, INT64, POINTER, TENSOR, Struct, pack_tensor
from kernels.cuda.bound import Launch
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


class Naive(MaterialisedAttention):
    """One thread per score, one thread per four bytes of output or gradient."""

    name = "naive"

    def scores(self, problem: Problem, mode: str, query: Tensor, key: Tensor, additional: Tensor | None) -> Launch:
        chunks, grid = chunks_of(problem.batch, problem.tokens * problem.heads, columns_of(problem))
        packed = SCORES.pack(
            geometry=geometry_of(problem),
            query=pack_tensor(query.stride(), problem.rank),
            key=pack_tensor(key.stride(), problem.rank),
            additional=pack_optional(additional),
            pitch=pitch_of(problem),
            channels=query.shape[-1],
            chunks=chunks,
        )
        source = _source("scores", problem.dtype, problem.rank, f"ScoreMode::{mode}")
        return Launch(source, grid, 0, packed, _set_scores)

    def weighted_sum(self, problem: Problem, value: Tensor, additional: Tensor | None, factor: float) -> Launch:
        chunks, grid = chunks_of(problem.batch, problem.tokens * problem.heads, _words(value))
        packed = OUTPUT.pack(
            geometry=geometry_of(problem),
            value=pack_tensor(value.stride(), problem.rank),
            additional=pack_optional(additional),
            pitch=pitch_of(problem),
            factor=factor,
            chunks=chunks,
        )
        return Launch(_source("output", problem.dtype, problem.rank), grid, 0, packed, _set_output)

    def inverse_sum(self, problem: Problem, source: Tensor, factor: float) -> Launch:
        chunks, grid = chunks_of(problem.batch, problem.tokens * problem.key_heads, _words(source))
        packed = INVERSE.pack(
            geometry=geometry_of(problem),
            source=pack_tensor(source.stride(), problem.rank),
            pitch=pitch_of(problem),
            factor=factor,
            chunks=chunks,
        )
        return Launch(_source("inverse", problem.dtype, problem.rank), grid, 0, packed, _set_inverse)

    def additional_sum(self, problem: Problem, source: Tensor, factor: float) -> Launch:
        rows, channels = problem.additional * problem.key_heads, source.shape[-1]
        shares, tokens = additional_shares(problem, chunks_of(problem.batch, rows, channels)[1])
        chunks, grid = chunks_of(shares * problem.batch, rows, channels)
        packed = ADDITIONAL.pack(
            geometry=geometry_of(problem),
            source=pack_tensor(source.stride(), problem.rank),
            pitch=pitch_of(problem),
            factor=factor,
            tokens_per_share=tokens,
            chunks=chunks,
        )
        return Launch(_source("additional", problem.dtype, problem.rank), grid, 0, packed, _set_additional, shares)


def _words(tensor: Tensor) -> int:
    """Four-byte words of a row of channels."""
    return tensor.shape[-1] * tensor.element_size() // 4


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
