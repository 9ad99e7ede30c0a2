"""Kernel family `flash`: fused neighborhood attention, forward and backward, for every problem on every device from 8.0 on.

Scores never leave the chip. Rows of a tile are a box of queries (of keys, for the gradients of key and value) inside one dilation
group; the tiles of what they see stream past them. See src/flash_*.cuh; kernels/cuda/flash_plan.py chooses the tiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

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
    pack_geometry,
    pack_tensor,
)
from kernels.cuda.flash_plan import (
    Plan,
    arithmetic_of,
    key_gradient_passes,
    plan_forward,
    plan_key_gradient,
    plan_query_gradient,
    rpb_entries,
    without_windows,
)
from kernels.cuda.flash_tiles import row_tiles
from kernels.cuda.jit import KernelSource
from kernels.problem import MAX_RANK, Axis, Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RPB_DTYPES = DTYPES
MAX_DIM = 256

BLOCKS_WANTED = 512
"""Blocks that share the work where partial sums cost memory: enough for two on each multiprocessor of a large device."""

PARTIALS_LIMIT = 64 << 20
"""Bytes of partial sums of the bias gradient."""

FLASH_FORWARD = Struct(
    "FlashForwardArguments",
    "src/flash_forward.cuh",
    geometry=GEOMETRY,
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    additional_keys=TENSOR,
    additional_values=TENSOR,
    output=TENSOR,
    lse=TENSOR,
    rpb=POINTER,
    tiles=INT.array(MAX_RANK),
)
_set_forward = FLASH_FORWARD.pointers(
    *(f"{name}.data" for name in ("query", "key", "value", "additional_keys", "additional_values", "output", "lse")),
    "rpb",
)

FLASH_QUERY_GRADIENT = Struct(
    "FlashQueryGradientArguments",
    "src/flash_query_gradient.cuh",
    geometry=GEOMETRY,
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    additional_keys=TENSOR,
    additional_values=TENSOR,
    output=TENSOR,
    lse=TENSOR,
    grad_output=TENSOR,
    grad_lse=TENSOR,
    grad_query=TENSOR,
    delta=TENSOR,
    rpb=POINTER,
    rpb_partials=POINTER,
    tiles=INT.array(MAX_RANK),
    all_tiles=INT,
)
_set_query_gradient = FLASH_QUERY_GRADIENT.pointers(
    *(
        f"{name}.data"
        for name in (
            "query",
            "key",
            "value",
            "additional_keys",
            "additional_values",
            "output",
            "lse",
            "grad_output",
            "grad_lse",
            "grad_query",
            "delta",
        )
    ),
    "rpb",
    "rpb_partials",
)

FLASH_KEY_GRADIENT = Struct(
    "FlashKeyGradientArguments",
    "src/flash_key_gradient.cuh",
    geometry=GEOMETRY,
    query=TENSOR,
    key=TENSOR,
    value=TENSOR,
    lse=TENSOR,
    delta=TENSOR,
    grad_output=TENSOR,
    grad_key=TENSOR,
    grad_value=TENSOR,
    rpb=POINTER,
    tiles=INT.array(MAX_RANK),
    chunk_tiles=INT,
    key_partial=INT64,
    value_partial=INT64,
)
_set_key_gradient = FLASH_KEY_GRADIENT.pointers(
    *(f"{name}.data" for name in ("query", "key", "value", "lse", "delta", "grad_output", "grad_key", "grad_value")),
    "rpb",
)

Strides = tuple[int, ...]
NO_TENSOR = bytes(TENSOR.size)


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything about a launch but the addresses."""

    plan: Plan
    grid: int
    packed: bytes
    chunks: int = 1
    """Partial sums that the host adds up, where the kernel leaves some."""

    def run(self, device: torch.device, arguments: bytes) -> None:
        runtime.kernel(self.plan.source, device).launch(self.grid, self.plan.shared_bytes, arguments)


def why_not(problem: Problem) -> str | None:
    """Why this family does not serve `problem`, in one sentence; None if it does."""
    if problem.dtype not in DTYPES:
        return f"flash computes in float32, float16 and bfloat16; this is {problem.dtype}."
    multiple = 4 if problem.dtype == torch.float32 else 8
    for name, dim in (("head_dim", problem.head_dim), ("value_dim", problem.value_dim)):
        if dim % multiple or not 0 < dim <= MAX_DIM:
            return f"flash takes multiples of {multiple} up to {MAX_DIM} for {name} in {problem.dtype}; it is {dim}."
    if problem.rpb_dtype is not None and problem.rpb_dtype not in RPB_DTYPES:
        return f"flash takes a bias in float32, float16 or bfloat16; this is {problem.rpb_dtype}."
    groups = math.prod(problem.dilation)
    tiles = math.prod(-(-axis.group_length(0) // 16) for axis in problem.axes)
    if groups * tiles * problem.batch * problem.heads > runtime.MAX_GRID:
        return "flash would need more blocks than a grid has."
    return None


def forward(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """Output and lse of a problem that `why_not` accepts."""
    query, key, value = operands.query, operands.key, operands.value
    inputs = _present(query, key, value, operands.additional_keys, operands.additional_values)
    output = query.new_empty((*query.shape[:-1], problem.value_dim))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    launch = _forward_launch(problem, tuple(t.stride() for t in inputs), alignment(inputs), tf32_allowed())
    rpb = None if operands.rpb is None else operands.rpb.contiguous()
    arguments = _set_forward(
        launch.packed,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        _address(operands.additional_keys),
        _address(operands.additional_values),
        output.data_ptr(),
        lse.data_ptr(),
        _address(rpb),
    )
    launch.run(query.device, arguments)
    return output, lse


def backward(
    problem: Problem,
    operands: Operands,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    needs_rpb_grad: bool,
) -> Gradients:
    """Gradients of the operands; the same bits every time."""
    query, key, value = operands.query, operands.key, operands.value
    additional_keys, additional_values = operands.additional_keys, operands.additional_values
    output, lse = output.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    rpb = None if operands.rpb is None else operands.rpb.contiguous()
    needs_rpb_grad = needs_rpb_grad and rpb is not None
    device, allow_tf32 = query.device, tf32_allowed()
    inputs = _present(query, key, value, additional_keys, additional_values, grad_output)
    strides, vector = tuple(t.stride() for t in inputs), alignment(inputs)

    delta = torch.empty_like(lse)
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query, key, value))
    launch = _query_gradient_launch(problem, strides, vector, allow_tf32, needs_rpb_grad)
    partials = None
    if needs_rpb_grad:
        partials = query.new_zeros((launch.chunks, *problem.rpb_shape), dtype=torch.float32)
    arguments = _set_query_gradient(
        launch.packed,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        _address(additional_keys),
        _address(additional_values),
        output.data_ptr(),
        lse.data_ptr(),
        grad_output.data_ptr(),
        _address(grad_lse),
        grad_query.data_ptr(),
        delta.data_ptr(),
        _address(rpb),
        _address(partials),
    )
    launch.run(device, arguments)

    shared_arguments = (query.data_ptr(), lse.data_ptr(), delta.data_ptr(), grad_output.data_ptr())
    for launch in _key_gradient_launches(problem, strides, vector, allow_tf32):
        launch.run(device, _key_gradient_arguments(launch, shared_arguments, key, value, grad_key, grad_value, rpb))
    grad_additional: list[Tensor | None] = [None, None]
    if additional_keys is not None and additional_values is not None:
        launches = _additional_gradient_launches(problem, strides, vector, allow_tf32)
        sums = [
            t.new_empty((launches[0].chunks, *t.shape), dtype=torch.float32)
            for t in (additional_keys, additional_values)
        ]
        for launch in launches:
            launch.run(
                device,
                _key_gradient_arguments(launch, shared_arguments, additional_keys, additional_values, *sums, None),
            )
        grad_additional = [partial.sum(0).to(problem.dtype) for partial in sums]
    return Gradients(
        query=grad_query,
        key=grad_key,
        value=grad_value,
        rpb=None if partials is None or rpb is None else partials.sum(0).to(rpb.dtype),
        additional_keys=grad_additional[0],
        additional_values=grad_additional[1],
    )


def representative_sources() -> Iterable[KernelSource]:
    """Kernels that must compile without a spill on every architecture."""
    square = (Axis(56, 7), Axis(56, 7))
    device = torch.device("cuda")
    cases = [
        (square, 32, torch.float16, torch.float32),
        (square, 64, torch.bfloat16, None),
        (square, 128, torch.bfloat16, None),
        (square, 32, torch.float32, None),
        (square, 64, torch.float32, torch.float32),
        ((Axis(4096, 256, causal=True),), 128, torch.float16, None),
        ((Axis(16, 5), Axis(32, 7, 2), Axis(32, 7, stride=2)), 64, torch.bfloat16, torch.bfloat16),
    ]
    for axes, head_dim, dtype, rpb_dtype in cases:
        problem = Problem(8, axes, 4, 4, head_dim, head_dim, head_dim**-0.5, dtype, device, rpb_dtype=rpb_dtype)
        for allow_tf32 in (False, True) if dtype == torch.float32 else (False,):
            yield from sources(problem, allow_tf32)


def sources(problem: Problem, allow_tf32: bool = False) -> Iterable[KernelSource]:
    """All kernels of a problem's forward and backward passes on aligned tensors."""
    arithmetic = arithmetic_of(problem.dtype, allow_tf32)
    yield plan_forward(problem, arithmetic, 16).source
    yield plan_query_gradient(problem, arithmetic, 16, problem.has_rpb).source
    for grad_key, grad_value in key_gradient_passes(problem, arithmetic):
        yield plan_key_gradient(problem, arithmetic, 16, grad_key, grad_value, False).source
        if problem.additional:
            yield plan_key_gradient(problem, arithmetic, 16, grad_key, grad_value, True).source


def tf32_allowed() -> bool:
    """Whether PyTorch lets float32 products round their operands to TF32; its older switches set the same value."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def alignment(tensors: Iterable[Tensor]) -> int:
    """Bytes, at most 16, that the address of every token of every tensor is a multiple of."""
    bits = 16
    for tensor in tensors:
        bits |= tensor.data_ptr()
        for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False):
            if size > 1:
                bits |= stride * tensor.element_size()
    return bits & -bits


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _contiguous(problem: Problem, heads: int, channels: int) -> bytes:
    """A contiguous tensor [batch, *space, heads, channels], without its address; lse has one channel."""
    strides, step = [], channels
    for size in (heads, *reversed(problem.space)):
        strides.append(step)
        step *= size
    return pack_tensor((step, *reversed(strides)), problem.rank)


def _pack_inputs(problem: Problem, strides: tuple[Strides, ...]) -> dict[str, bytes]:
    """The tensors whose strides were given: query, key, value, then the additional ones if any, then grad_output if given."""
    packed = {
        name: pack_tensor(stride, problem.rank)
        for name, stride in zip(("query", "key", "value"), strides[:3], strict=True)
    }
    rest = strides[3:]
    packed |= {"additional_keys": NO_TENSOR, "additional_values": NO_TENSOR}
    if problem.additional:
        packed |= {"additional_keys": pack_tensor(rest[0], 1), "additional_values": pack_tensor(rest[1], 1)}
        rest = rest[2:]
    if rest:
        packed["grad_output"] = pack_tensor(rest[0], problem.rank)
    return packed


def _all_tiles(problem: Problem, tiles: Iterable[int], heads: int) -> int:
    return math.prod(tiles) * math.prod(problem.dilation) * problem.batch * heads


@functools.lru_cache(maxsize=1024)
def _forward_launch(problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool) -> Launch:
    plan = plan_forward(problem, arithmetic_of(problem.dtype, allow_tf32), vector)
    tiles = row_tiles(problem.axes, plan.choice.tiling.rows)
    packed = FLASH_FORWARD.pack(
        geometry=pack_geometry(problem),
        **_pack_inputs(problem, strides),
        output=_contiguous(problem, problem.heads, problem.value_dim),
        lse=_contiguous(problem, problem.heads, 1),
        tiles=tiles,
    )
    return Launch(plan, _all_tiles(problem, tiles, problem.heads), packed)


@functools.lru_cache(maxsize=1024)
def _query_gradient_launch(
    problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool, needs_rpb_grad: bool
) -> Launch:
    plan = plan_query_gradient(problem, arithmetic_of(problem.dtype, allow_tf32), vector, needs_rpb_grad)
    tiles = row_tiles(problem.axes, plan.choice.tiling.rows)
    all_tiles = _all_tiles(problem, tiles, problem.heads)
    lse = _contiguous(problem, problem.heads, 1)
    packed = FLASH_QUERY_GRADIENT.pack(
        geometry=pack_geometry(problem),
        **_pack_inputs(problem, strides),
        output=_contiguous(problem, problem.heads, problem.value_dim),
        lse=lse,
        grad_lse=lse,
        grad_query=_contiguous(problem, problem.heads, problem.head_dim),
        delta=lse,
        tiles=tiles,
        all_tiles=all_tiles,
    )
    chunks = all_tiles // problem.heads
    if needs_rpb_grad:
        affordable = PARTIALS_LIMIT // (4 * rpb_entries(problem) * problem.heads)
        chunks = max(min(chunks, -(-BLOCKS_WANTED // problem.heads), affordable), 1)
    return Launch(plan, chunks * problem.heads, packed, chunks)


@functools.lru_cache(maxsize=1024)
def _key_gradient_launches(
    problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool
) -> tuple[Launch, ...]:
    arithmetic = arithmetic_of(problem.dtype, allow_tf32)
    inputs = _pack_inputs(problem, strides)
    launches = []
    for grad_key, grad_value in key_gradient_passes(problem, arithmetic):
        plan = plan_key_gradient(problem, arithmetic, vector, grad_key, grad_value, additional_rows=False)
        tiles = row_tiles(problem.axes, plan.choice.tiling.rows)
        packed = _pack_key_gradient(
            problem,
            inputs,
            key=inputs["key"],
            value=inputs["value"],
            grad_key=_contiguous(problem, problem.key_heads, problem.head_dim),
            grad_value=_contiguous(problem, problem.key_heads, problem.value_dim),
            tiles=tiles,
            chunk_tiles=0,
        )
        launches.append(Launch(plan, _all_tiles(problem, tiles, problem.key_heads), packed))
    return tuple(launches)


@functools.lru_cache(maxsize=1024)
def _additional_gradient_launches(
    problem: Problem, strides: tuple[Strides, ...], vector: int, allow_tf32: bool
) -> tuple[Launch, ...]:
    """Rows are the additional keys; every block takes `chunk_tiles` tiles of the map's queries and writes a partial sum."""
    arithmetic = arithmetic_of(problem.dtype, allow_tf32)
    inputs = _pack_inputs(problem, strides)
    map_only = without_windows(problem)
    launches = []
    for grad_key, grad_value in key_gradient_passes(problem, arithmetic):
        plan = plan_key_gradient(problem, arithmetic, vector, grad_key, grad_value, additional_rows=True)
        tiles = -(-problem.additional // plan.choice.rows)
        blocks = tiles * problem.batch * problem.key_heads
        query_tiles = math.prod(row_tiles(map_only.axes, plan.choice.tiling.columns))
        chunk_tiles = -(-query_tiles // max(-(-BLOCKS_WANTED // blocks), 1))
        chunks = -(-query_tiles // chunk_tiles)
        packed = _pack_key_gradient(
            map_only,
            inputs,
            key=inputs["additional_keys"],
            value=inputs["additional_values"],
            grad_key=_additional_output(problem, problem.head_dim),
            grad_value=_additional_output(problem, problem.value_dim),
            tiles=(1, 1, tiles),
            chunk_tiles=chunk_tiles,
        )
        launches.append(Launch(plan, chunks * blocks, packed, chunks))
    return tuple(launches)


def _pack_key_gradient(problem: Problem, inputs: dict[str, bytes], **rest: object) -> bytes:
    lse = _contiguous(problem, problem.heads, 1)
    tokens = problem.batch * problem.additional * problem.key_heads
    return FLASH_KEY_GRADIENT.pack(
        geometry=pack_geometry(problem),
        query=inputs["query"],
        grad_output=inputs["grad_output"],
        lse=lse,
        delta=lse,
        key_partial=tokens * problem.head_dim,
        value_partial=tokens * problem.value_dim,
        **rest,
    )


def _additional_output(problem: Problem, channels: int) -> bytes:
    row = problem.key_heads * channels
    return pack_tensor((problem.additional * row, row, channels), 1)


def _key_gradient_arguments(
    launch: Launch,
    shared_arguments: tuple[int, int, int, int],
    key: Tensor,
    value: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    rpb: Tensor | None,
) -> bytes:
    query, lse, delta, grad_output = shared_arguments
    return _set_key_gradient(
        launch.packed,
        query,
        key.data_ptr(),
        value.data_ptr(),
        lse,
        delta,
        grad_output,
        grad_key.data_ptr(),
        grad_value.data_ptr(),
        _address(rpb),
    )
