"""The two methods that keep the attention weights in memory: what `naive` and `gemm` have in common.

Both are baselines of arXiv 2403.04690. Products of queries and keys are written to a matrix `[batch, tokens, heads,
pitch]` of the inputs' type, a kernel of its own takes the softmax in place, further products read it back. They differ
in how the products are computed, which is what a subclass of `MaterialisedAttention` says. Between forward and backward
only output and lse are kept: the backward pass makes the weights again, takes the value's gradient, then overwrites
them with their own gradient, so that one matrix is all there ever is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from kernels.backend import Gradients, Operands
from kernels.cuda import runtime
from kernels.cuda.arguments import (
    GEOMETRY,
    INT,
    INT64,
    POINTER,
    TENSOR,
    Struct,
    address,
    aligned,
    pack_geometry,
    pack_tensor,
)
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Problem

MAX_CHANNELS = 256
ROW_ALIGNMENT = 8  # elements: rows of weights start at 16 bytes or more
ELEMENT_THREADS = 256  # of kernels that give every thread one element
BIAS_THREADS = 128
BIAS_QUERY_BYTES = 32  # sizeof(BiasQuery)
SHARES = 2048  # blocks that a reduction over all queries is cut into, at most about
SHARED_TOKENS = 64  # tokens that one share of the additional keys' gradient has at least

CHUNKS = Struct(
    "Chunks",
    "fastna/weights.cuh",
    rows=INT,
    columns=INT,
    rows_per_chunk=INT,
    chunks=INT,
    blocks_per_chunk=INT,
)
SOFTMAX = Struct(
    "WeightsSoftmaxArguments",
    "src/weights_softmax.cuh",
    geometry=GEOMETRY,
    weights=POINTER,
    lse=POINTER,
    pitch=INT64,
    blocks=INT,
)
DELTA = Struct(
    "WeightsDeltaArguments",
    "src/weights_delta.cuh",
    geometry=GEOMETRY,
    output=TENSOR,
    grad_output=TENSOR,
    grad_lse=POINTER,
    delta=POINTER,
    channels=INT,
    blocks=INT,
)
BIAS_GRADIENT = Struct(
    "WeightsBiasGradientArguments",
    "src/weights_bias_gradient.cuh",
    geometry=GEOMETRY,
    gradients=POINTER,
    partials=POINTER,
    pitch=INT64,
    queries_per_share=INT64,
    runs=INT,
)


def columns_of(problem: Problem) -> int:
    """Keys of one query: columns of the weights that mean something."""
    return problem.window_size + problem.additional


def pitch_of(problem: Problem) -> int:
    """Elements from one row of the weights to the next."""
    return -(-columns_of(problem) // ROW_ALIGNMENT) * ROW_ALIGNMENT


@lru_cache(maxsize=1024)
def geometry_of(problem: Problem) -> bytes:
    return pack_geometry(problem)


@lru_cache(maxsize=1024)
def chunks_of(matrices: int, rows: int, columns: int) -> tuple[bytes, int]:
    """`Chunks` of so many matrices, and the blocks of ELEMENT_THREADS threads that give each element one thread.

    A chunk has at most 2^30 elements, so that a thread finds its own by 32-bit arithmetic.
    """
    rows_per_chunk = max(1, min(rows, (1 << 30) // columns))
    chunks = -(-rows // rows_per_chunk)
    blocks_per_chunk = -(-rows_per_chunk * columns // ELEMENT_THREADS)
    packed = CHUNKS.pack(
        rows=rows,
        columns=columns,
        rows_per_chunk=rows_per_chunk,
        chunks=chunks,
        blocks_per_chunk=blocks_per_chunk,
    )
    return packed, matrices * chunks * blocks_per_chunk


def pack_optional(strides: tuple[int, ...] | None) -> bytes:
    """TensorArguments of additional keys or values, all zero where there are none."""
    return pack_tensor((0, 0, 0) if strides is None else strides, rank=1)


def strides_of(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _source(name: str, dtype: torch.dtype, rank: int, threads: int, *parameters: object) -> KernelSource:
    """Kernel src/weights_NAME.cuh for one type and rank."""
    camel = "Weights" + "".join(part.capitalize() for part in name.split("_"))
    config = instantiate(f"{camel}Config", dtype, rank, *parameters, threads)
    return KernelSource(f"src/weights_{name}.cuh", f"weights_{name}", config, f"{camel}Arguments", threads)


def representative_weights_sources(dtype: torch.dtype, rank: int) -> Iterable[KernelSource]:
    """The kernels that both methods share, in every form they are used in."""
    for lanes in (8, 32):
        for masked in (False, True):
            yield _source("softmax", dtype, rank, ELEMENT_THREADS, lanes, masked)
    for lanes in (4, 8):
        yield _source("delta", dtype, rank, ELEMENT_THREADS, lanes)
    yield _source("bias_gradient", dtype, rank, BIAS_THREADS)


_set_softmax = SOFTMAX.pointers()
_set_delta = DELTA.pointers()
_set_bias_gradient = BIAS_GRADIENT.pointers()


@lru_cache(maxsize=1024)
def _softmax_plan(problem: Problem) -> tuple[KernelSource, int, bytes]:
    lanes = 8 if pitch_of(problem) <= 128 else 32
    masked = any(axis.causal for axis in problem.axes)
    source = _source("softmax", problem.dtype, problem.rank, ELEMENT_THREADS, lanes, masked)
    blocks = -(-problem.tokens * problem.heads * lanes // ELEMENT_THREADS)
    packed = SOFTMAX.pack(geometry=geometry_of(problem), pitch=pitch_of(problem), blocks=blocks)
    return source, problem.batch * blocks, packed


@lru_cache(maxsize=1024)
def _delta_plan(
    problem: Problem, output: tuple[int, ...], grad_output: tuple[int, ...]
) -> tuple[KernelSource, int, bytes]:
    lanes = 4 if problem.value_dim * problem.dtype.itemsize <= 64 else 8
    source = _source("delta", problem.dtype, problem.rank, ELEMENT_THREADS, lanes)
    blocks = -(-problem.tokens * problem.heads * lanes // ELEMENT_THREADS)
    packed = DELTA.pack(
        geometry=geometry_of(problem),
        output=pack_tensor(output, problem.rank),
        grad_output=pack_tensor(grad_output, problem.rank),
        channels=problem.value_dim,
        blocks=blocks,
    )
    return source, problem.batch * blocks, packed


@lru_cache(maxsize=1024)
def _bias_gradient_plan(problem: Problem) -> tuple[KernelSource, int, int, bytes]:
    """The kernel, its grid, the number of shares, and the arguments."""
    offsets = math.prod(problem.rpb_shape[1:])
    runs = -(-offsets // BIAS_THREADS)
    queries = problem.batch * problem.tokens
    shares = max(1, min(SHARES // (runs * problem.heads), -(-queries // BIAS_THREADS)))
    packed = BIAS_GRADIENT.pack(
        geometry=geometry_of(problem),
        pitch=pitch_of(problem),
        queries_per_share=-(-queries // shares),
        runs=runs,
    )
    return (
        _source("bias_gradient", problem.dtype, problem.rank, BIAS_THREADS),
        shares * problem.heads * runs,
        shares,
        packed,
    )


class MaterialisedAttention(ABC):
    """A backend that writes the attention weights to memory. Subclasses compute the three products."""

    name: str

    def why_not(self, problem: Problem) -> str | None:
        """See kernels.backend.Backend."""
        if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it computes in float32, float16 and bfloat16, not in {problem.dtype}."
        reason = runtime.why_not_here(problem)
        if reason is not None:
            return reason
        unit = 16 // problem.dtype.itemsize
        for name, size in (("head_dim", problem.head_dim), ("value_dim", problem.value_dim)):
            if size % unit or not 0 < size <= MAX_CHANNELS:
                return f"{name} {size} is not a multiple of {unit} from {unit} to {MAX_CHANNELS} ({problem.dtype})."
        # The last block's threads count on past the last row.
        if problem.tokens * problem.heads > (1 << 31) - ELEMENT_THREADS or columns_of(problem) >= 1 << 30:
            return "one map has about 2^31 queries over its heads, or a query 2^30 keys."
        return None

    def forward(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
        """See kernels.backend.Backend. Takes `pitch` elements per query and head of memory on the way."""
        operands = _aligned_operands(operands)
        query = operands.query
        weights = self._new_weights(problem, query)
        self.scores(
            problem, "SCORE", query, operands.key, operands.additional_keys, weights, _bias_table(operands.rpb), None
        )
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        source, grid, packed = _softmax_plan(problem)
        runtime.kernel(source, problem.device).launch(grid, 0, _set_softmax(packed, weights.data_ptr(), lse.data_ptr()))
        output = self.weighted_sum(problem, weights, operands.value, operands.additional_values, 1.0)
        return output, lse

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        needs_rpb_grad: bool,
    ) -> Gradients:
        """See kernels.backend.Backend."""
        operands = _aligned_operands(operands)
        grad_output, output = aligned(grad_output), aligned(output)
        query, key, value = operands.query, operands.key, operands.value
        keys, values = operands.additional_keys, operands.additional_values

        weights = self._new_weights(problem, query)
        self.scores(problem, "WEIGHT", query, key, keys, weights, _bias_table(operands.rpb), lse.contiguous())
        grad_value = self.inverse_sum(problem, weights, grad_output, 1.0)
        grad_values = None if values is None else self.additional_sum(problem, weights, grad_output, 1.0)

        delta = self._delta(problem, output, grad_output, grad_lse)
        self.scores(problem, "GRADIENT", grad_output, value, values, weights, None, delta)
        grad_query = self.weighted_sum(problem, weights, key, keys, problem.scale)
        grad_key = self.inverse_sum(problem, weights, query, problem.scale)
        grad_keys = None if keys is None else self.additional_sum(problem, weights, query, problem.scale)
        grad_rpb = None
        if needs_rpb_grad and operands.rpb is not None:
            grad_rpb = self._bias_gradient(problem, weights).to(operands.rpb.dtype)
        return Gradients(grad_query, grad_key, grad_value, grad_rpb, grad_keys, grad_values)

    @abstractmethod
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
        """Pointwise-neighbourhood: products of every query with its keys, into `weights`.

        `mode` is a ScoreMode of fastna/weights.cuh. "SCORE" stores `scale * product + rpb`; "WEIGHT" stores
        `exp(that - statistic)`, the statistic being lse; "GRADIENT" replaces each weight by `weight * (product -
        statistic)`, with grad_output for query, value for key and delta for the statistic.
        """

    @abstractmethod
    def weighted_sum(
        self, problem: Problem, weights: Tensor, value: Tensor, additional: Tensor | None, factor: float
    ) -> Tensor:
        """Neighbourhood-neighbourhood: `factor` times the sum of `weight * value` over each query's keys.

        `[batch, *space, heads, channels]`, as channels `value` has.
        """

    @abstractmethod
    def inverse_sum(self, problem: Problem, weights: Tensor, source: Tensor, factor: float) -> Tensor:
        """Inverse neighbourhood: for each key, `factor` times the sum of `weight * source` over its queries."""

    @abstractmethod
    def additional_sum(self, problem: Problem, weights: Tensor, source: Tensor, factor: float) -> Tensor:
        """The same for the additional keys, which every query sees: `[batch, additional, key_heads, channels]`."""

    def _new_weights(self, problem: Problem, query: Tensor) -> Tensor:
        return query.new_empty((problem.batch, problem.tokens, problem.heads, pitch_of(problem)))

    def _delta(self, problem: Problem, output: Tensor, grad_output: Tensor, grad_lse: Tensor | None) -> Tensor:
        delta = output.new_empty(output.shape[:-1], dtype=torch.float32)
        if grad_lse is not None:
            grad_lse = grad_lse.to(torch.float32).contiguous()
        source, grid, packed = _delta_plan(problem, output.stride(), grad_output.stride())
        arguments = _set_delta(packed, output.data_ptr(), grad_output.data_ptr(), address(grad_lse), delta.data_ptr())
        runtime.kernel(source, problem.device).launch(grid, 0, arguments)
        return delta

    def _bias_gradient(self, problem: Problem, gradients: Tensor) -> Tensor:
        source, grid, shares, packed = _bias_gradient_plan(problem)
        partials = gradients.new_empty((shares, *problem.rpb_shape), dtype=torch.float32)
        runtime.kernel(source, problem.device).launch(
            grid,
            BIAS_THREADS * BIAS_QUERY_BYTES,
            _set_bias_gradient(packed, gradients.data_ptr(), partials.data_ptr()),
        )
        return partials.sum(0)


def _aligned_operands(operands: Operands) -> Operands:
    return Operands(
        aligned(operands.query),
        aligned(operands.key),
        aligned(operands.value),
        operands.rpb,
        None if operands.additional_keys is None else aligned(operands.additional_keys),
        None if operands.additional_values is None else aligned(operands.additional_values),
    )


def _bias_table(rpb: Tensor | None) -> Tensor | None:
    return None if rpb is None else rpb.to(torch.float32).contiguous()


def additional_shares(problem: Problem, blocks: int) -> tuple[int, int]:
    """How many shares the tokens are cut into for the additional keys' gradient, and the tokens of each.

    `blocks` is what one share takes of the device.
    """
    shares = max(1, min(SHARES // blocks, -(-problem.tokens // SHARED_TOKENS)))
    tokens = -(-problem.tokens // shares)
    return -(-problem.tokens // tokens), tokens
