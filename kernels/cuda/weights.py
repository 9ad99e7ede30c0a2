"""The two methods that keep the attention weights in memory: what `naive` and `gemm` have in common.

Both are baselines of arXiv 2403.04690. Products of queries and keys are written to a matrix `[batch, tokens, heads,
pitch]` of the inputs' type, a kernel of its own takes the softmax in place, further products read it back. They differ
in how the products are computed, which is what a subclass of `MaterialisedAttention` says. Between forward and backward
only output and lse are kept: the backward pass makes the weights again, takes the value's gradient, then overwrites
them with their own gradient, so that one matrix is all there ever is.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kernels.backend import BoundBackward, BoundForward, Gradients, Operands
from kernels.cuda import bound, runtime
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
from kernels.cuda.bound import Launch
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


@functools.lru_cache(maxsize=1024)
def geometry_of(problem: Problem) -> bytes:
    return pack_geometry(problem)


@functools.lru_cache(maxsize=1024)
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


def pack_optional(tensor: Tensor | None) -> bytes:
    """TensorArguments of additional keys or values, all zero where there are none."""
    return pack_tensor((0, 0, 0) if tensor is None else tensor.stride(), rank=1)


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


def _softmax(problem: Problem) -> Launch:
    lanes = 8 if pitch_of(problem) <= 128 else 32
    masked = any(axis.causal for axis in problem.axes)
    source = _source("softmax", problem.dtype, problem.rank, ELEMENT_THREADS, lanes, masked)
    blocks = -(-problem.tokens * problem.heads * lanes // ELEMENT_THREADS)
    packed = SOFTMAX.pack(geometry=geometry_of(problem), pitch=pitch_of(problem), blocks=blocks)
    return Launch(source, problem.batch * blocks, 0, packed, _set_softmax)


def _delta(problem: Problem, output: Tensor, grad_output: Tensor) -> Launch:
    lanes = 4 if problem.value_dim * problem.dtype.itemsize <= 64 else 8
    source = _source("delta", problem.dtype, problem.rank, ELEMENT_THREADS, lanes)
    blocks = -(-problem.tokens * problem.heads * lanes // ELEMENT_THREADS)
    packed = DELTA.pack(
        geometry=geometry_of(problem),
        output=pack_tensor(output.stride(), problem.rank),
        grad_output=pack_tensor(grad_output.stride(), problem.rank),
        channels=problem.value_dim,
        blocks=blocks,
    )
    return Launch(source, problem.batch * blocks, 0, packed, _set_delta)


def _bias_gradient(problem: Problem) -> Launch:
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
    source = _source("bias_gradient", problem.dtype, problem.rank, BIAS_THREADS)
    shared_bytes = BIAS_THREADS * BIAS_QUERY_BYTES
    return Launch(source, shares * problem.heads * runs, shared_bytes, packed, _set_bias_gradient, shares)


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

    def bind_forward(self, problem: Problem, operands: Operands) -> BoundForward:
        """See kernels.backend.bind_forward. Takes `pitch` elements per query and head of memory on the way."""
        return _bind_aligned(functools.partial(self._bind_forward, problem), operands.tensors)

    def _bind_forward(self, problem: Problem, *tensors: Tensor) -> BoundForward:
        query, key, value, _, keys, values = tensors
        weigh = self.scores(problem, "SCORE", query, key, keys).bind(problem.device)
        softmax = _softmax(problem).bind(problem.device)
        sum_values = self.weighted_sum(problem, value, values, 1.0).bind(problem.device)
        new_weights = _new_weights(problem)
        new_output, new_lse = bound.new_results(problem)

        def call(
            query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, keys: Tensor | None, values: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            weights, output, lse, bias = new_weights(), new_output(), new_lse(), _bias_table(rpb)
            weigh(*map(address, (query, key, keys, weights, bias, None)))
            softmax(*map(address, (weights, lse)))
            sum_values(*map(address, (weights, value, values, output)))
            return output, lse

        return call

    def bind_backward(
        self,
        problem: Problem,
        operands: Operands,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        needs_rpb_grad: bool,
    ) -> BoundBackward:
        """See kernels.backend.bind_backward."""
        tensors = (*operands.tensors, output, lse, grad_output, grad_lse)
        return _bind_aligned(functools.partial(self._bind_backward, problem, needs_rpb_grad), tensors)

    def _bind_backward(self, problem: Problem, needs_rpb_grad: bool, *tensors: Tensor) -> BoundBackward:
        query, key, value, _, keys, values, output, _, grad_output, _ = tensors
        device, scale = problem.device, problem.scale
        weigh = self.scores(problem, "WEIGHT", query, key, keys).bind(device)
        sum_outputs = self.inverse_sum(problem, grad_output, 1.0).bind(device)
        delta_of = _delta(problem, output, grad_output).bind(device)
        slope = self.scores(problem, "GRADIENT", grad_output, value, values).bind(device)
        sum_keys = self.weighted_sum(problem, key, keys, scale).bind(device)
        sum_queries = self.inverse_sum(problem, query, scale).bind(device)
        sum_all_outputs = self._bind_additional_sum(problem, grad_output, 1.0) if problem.additional else None
        sum_all_queries = self._bind_additional_sum(problem, query, scale) if problem.additional else None
        sum_bias = _bind_bias_sum(problem) if needs_rpb_grad else None
        new_weights = _new_weights(problem)
        new_query, new_key, new_value = bound.new_gradients(problem)
        _, new_delta = bound.new_results(problem)

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            rpb: Tensor | None,
            keys: Tensor | None,
            values: Tensor | None,
            output: Tensor,
            lse: Tensor,
            grad_output: Tensor,
            grad_lse: Tensor | None,
        ) -> Gradients:
            weights, bias, lse = new_weights(), _bias_table(rpb), lse.contiguous()
            weigh(*map(address, (query, key, keys, weights, bias, lse)))
            grad_value = new_value()
            sum_outputs(*map(address, (weights, grad_output, grad_value)))
            grad_values = None if sum_all_outputs is None else sum_all_outputs(weights, grad_output)

            delta = new_delta()
            grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
            delta_of(*map(address, (output, grad_output, grad_lse, delta)))
            slope(*map(address, (grad_output, value, values, weights, None, delta)))
            grad_query, grad_key = new_query(), new_key()
            sum_keys(*map(address, (weights, key, keys, grad_query)))
            sum_queries(*map(address, (weights, query, grad_key)))
            grad_keys = None if sum_all_queries is None else sum_all_queries(weights, query)
            grad_rpb = None if sum_bias is None else sum_bias(weights)
            return Gradients(grad_query, grad_key, grad_value, grad_rpb, grad_keys, grad_values)

        return call

    def _bind_additional_sum(
        self, problem: Problem, source: Tensor, factor: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Of weights and source: the gradient of additional keys or values."""
        planned = self.additional_sum(problem, source, factor)
        shape = (planned.parts, problem.batch, problem.additional, problem.key_heads, source.shape[-1])
        return _bind_sum(problem, planned, shape, problem.dtype)

    @abstractmethod
    def scores(self, problem: Problem, mode: str, query: Tensor, key: Tensor, additional: Tensor | None) -> Launch:
        """Pointwise-neighbourhood: products of every query with its keys, into the weights.

        `mode` is a ScoreMode of fastna/weights.cuh. "SCORE" stores `scale * product + rpb`; "WEIGHT" stores
        `exp(that - statistic)`, the statistic being lse; "GRADIENT" replaces each weight by `weight * (product -
        statistic)`, with grad_output for query, value for key and delta for the statistic. Takes the addresses of
        query, key, additional keys, weights, rpb (contiguous, float32) and statistic. Here and below, tensors given
        are like those of the call.
        """

    @abstractmethod
    def weighted_sum(self, problem: Problem, value: Tensor, additional: Tensor | None, factor: float) -> Launch:
        """Neighbourhood-neighbourhood: `factor` times the sum of `weight * value` over each query's keys.

        Takes the addresses of weights, value, additional values and the sums, `[batch, *space, heads, channels]`, as
        channels `value` has.
        """

    @abstractmethod
    def inverse_sum(self, problem: Problem, source: Tensor, factor: float) -> Launch:
        """Inverse neighbourhood: for each key, `factor` times the sum of `weight * source` over its queries.

        Takes the addresses of weights, source and the sums, `[batch, *space, key_heads, channels]`.
        """

    @abstractmethod
    def additional_sum(self, problem: Problem, source: Tensor, factor: float) -> Launch:
        """The same for the additional keys, which every query sees.

        The sums come in float32 and in parts, `[parts, batch, additional, key_heads, channels]`.
        """


_Bound = TypeVar("_Bound", BoundForward, BoundBackward)


def _bind_aligned(bind: Callable[..., _Bound], tensors: Sequence[Tensor | None]) -> _Bound:
    """What `bind` makes of tensors that 16-byte copies can read: of copies, in every call, where these are not so."""
    readable = _aligned(tensors)
    call = bind(*readable)
    if all(one is other for one, other in zip(tensors, readable, strict=True)):
        return call
    return lambda *tensors: call(*_aligned(tensors))


_COPIED = (True, True, True, False, True, True, True, False, True, False)
"""Of query, key, value, rpb, additional keys and values, output, lse, grad_output, grad_lse: rows of channels."""


def _aligned(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        aligned(tensor) if tensor is not None and is_copied else tensor
        for tensor, is_copied in zip(tensors, _COPIED, strict=False)
    ]


def _new_weights(problem: Problem) -> Callable[[], Tensor]:
    return bound.new((problem.batch, problem.tokens, problem.heads, pitch_of(problem)), problem.dtype, problem.device)


def _bind_bias_sum(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Of the weights' gradient: that of rpb."""
    assert problem.rpb_dtype is not None
    planned = _bias_gradient(problem)
    return _bind_sum(problem, planned, (planned.parts, *problem.rpb_shape), problem.rpb_dtype)


def _bind_sum(problem: Problem, planned: Launch, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    """Of what the launch reads: the sum over the float32 parts of this shape that it leaves."""
    launch = planned.bind(problem.device)
    new_parts = bound.new(shape, torch.float32, problem.device)

    def call(*read: Tensor) -> Tensor:
        parts = new_parts()
        launch(*map(address, (*read, parts)))
        return parts.sum(0).to(dtype)

    return call


def _bias_table(rpb: Tensor | None) -> Tensor | None:
    return None if rpb is None else rpb.to(torch.float32).contiguous()


def additional_shares(problem: Problem, blocks: int) -> tuple[int, int]:
    """How many shares the tokens are cut into for the additional keys' gradient, and the tokens of each.

    `blocks` is what one share takes of the device.
    """
    shares = max(1, min(SHARES // blocks, -(-problem.tokens // SHARED_TOKENS)))
    tokens = -(-problem.tokens // shares)
    return -(-problem.tokens // tokens), tokens
