"""Plans of the flash kernels: tiles, stages and shared memory for a problem, and the sources that follow from them.

Sizes in bytes mirror the layouts at the head of src/flash_*.cuh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.cuda.flash_tiles import Tiling, choose_tiling
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Axis, Problem

SHARED_LIMIT = 99 << 10
"""Shared memory of a block on the smallest devices served (8.6, 8.9, 12.0)."""

BIAS_LIMIT = 24 << 10
"""A bias table up to this size is copied to shared memory."""

WARP_ROWS = 16
INTERVAL_BYTES = 8


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products are computed: the C++ policy of tile_gemm.cuh, and what its accumulators leave room for."""

    cxx: str
    dtype: torch.dtype
    is_16_bit: bool

    @property
    def itemsize(self) -> int:
        return 2 if self.is_16_bit else 4


def arithmetic_of(dtype: torch.dtype, allow_tf32: bool) -> Arithmetic:
    if dtype == torch.float32:
        return Arithmetic("TensorCoreTf32" if allow_tf32 else "ExactFloat", dtype, False)
    return Arithmetic(instantiate("TensorCore16", dtype), dtype, True)


def padded(channels: int) -> int:
    return -(-channels // 16) * 16


def pitch(channels: int, itemsize: int) -> int:
    """Bytes from a row of a tile to the next."""
    return padded(channels) * itemsize + 16


@dataclass(frozen=True, slots=True)
class Choice:
    """What the host decides about a kernel; FlashConfig of include/fastna/flash_config.cuh."""

    arithmetic: Arithmetic
    head_dim: int
    value_dim: int
    tiling: Tiling
    rank: int
    stages: int
    vector: int
    resident: bool
    bias: str
    rpb_dtype: torch.dtype | None
    additional: bool

    @property
    def rows(self) -> int:
        return math.prod(self.tiling.rows)

    @property
    def columns(self) -> int:
        return math.prod(self.tiling.columns)

    @property
    def threads(self) -> int:
        return self.rows // WARP_ROWS * 32

    @property
    def config(self) -> str:
        return instantiate(
            "FlashConfig",
            self.arithmetic.cxx,
            self.head_dim,
            self.value_dim,
            instantiate("TileBox", self.rank, *self.tiling.rows),
            instantiate("TileBox", self.rank, *self.tiling.columns),
            self.stages,
            self.vector,
            self.resident,
            f"BiasKind::{self.bias}",
            self.rpb_dtype or "float",
            self.additional,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    choice: Choice
    source: KernelSource
    shared_bytes: int


def rpb_entries(problem: Problem) -> int:
    return math.prod(problem.rpb_shape[1:]) if problem.has_rpb else 0


def plan_forward(problem: Problem, arithmetic: Arithmetic, vector: int) -> Plan:
    widest = padded(max(problem.head_dim, problem.value_dim)) * arithmetic.itemsize
    columns = 64 if widest <= 256 else 32 if widest <= 512 else 16
    resident = arithmetic.is_16_bit and problem.head_dim <= 32

    def shared(choice: Choice) -> int:
        head, value = _pitches(choice)
        tiles = choice.stages * choice.columns * (head + value) + choice.rows * head
        total = tiles + _windows(choice) + _bias_bytes(problem, choice)
        return max(total, choice.rows * value)

    choice, shared_bytes = _fit(problem, arithmetic, vector, columns, resident, False, shared)
    blocks = 2 if widest <= 256 else 1
    if arithmetic.is_16_bit and problem.rank < 3 and widest <= (64 if problem.has_rpb else 128):
        blocks = 3
    source = KernelSource(
        "src/flash_forward.cuh",
        "flash_forward",
        choice.config,
        "FlashForwardArguments",
        choice.threads,
        _min_blocks(choice, blocks),
        shared_bytes,
    )
    return Plan(choice, source, shared_bytes)


def plan_query_gradient(problem: Problem, arithmetic: Arithmetic, vector: int, needs_rpb_grad: bool) -> Plan:
    widest = padded(max(problem.head_dim, problem.value_dim)) * arithmetic.itemsize
    resident = arithmetic.is_16_bit and widest <= 64
    entries = rpb_entries(problem)
    gradient = "NONE" if not needs_rpb_grad else "SHARED" if entries * 4 <= BIAS_LIMIT else "GLOBAL"

    def shared(choice: Choice) -> int:
        head, value = _pitches(choice)
        tiles = choice.stages * choice.columns * (head + value) + choice.rows * (head + value)
        bias = (entries + entries % 2) * 4 if choice.bias == "SHARED" else 0
        table = entries * 4 if gradient == "SHARED" else 0
        scores = choice.rows * (choice.columns + 2) * 4 if needs_rpb_grad else 0
        return tiles + _windows(choice) + bias + scores + table

    choice, shared_bytes = _fit(problem, arithmetic, vector, _gradient_columns(widest), resident, False, shared)
    source = KernelSource(
        "src/flash_query_gradient.cuh",
        "flash_query_gradient",
        instantiate("QueryGradientConfig", choice.config, f"BiasKind::{gradient}"),
        "FlashQueryGradientArguments",
        choice.threads,
        _min_blocks(choice, 2 if widest <= 256 else 1),
        shared_bytes,
    )
    return Plan(choice, source, shared_bytes)


def key_gradient_passes(problem: Problem, arithmetic: Arithmetic) -> tuple[tuple[bool, bool], ...]:
    """(gradient of key, gradient of value) of each launch: both at once while their accumulators fit the registers."""
    limit = 128 if arithmetic.is_16_bit else 64
    if padded(max(problem.head_dim, problem.value_dim)) <= limit:
        return ((True, True),)
    return ((True, False), (False, True))


def plan_key_gradient(
    problem: Problem, arithmetic: Arithmetic, vector: int, grad_key: bool, grad_value: bool, additional_rows: bool
) -> Plan:
    widest = padded(max(problem.head_dim, problem.value_dim)) * arithmetic.itemsize
    if additional_rows:
        problem = without_windows(problem)
    output_itemsize = 4 if additional_rows else arithmetic.itemsize

    def shared(choice: Choice) -> int:
        head, value = _pitches(choice)
        stage = choice.columns * (head + value) + 2 * choice.columns * 4
        rows = choice.rows * (head + (value if grad_key else 0))
        total = choice.stages * stage + rows + _windows(choice) + _bias_bytes(problem, choice)
        widest_output = max(choice.head_dim, choice.value_dim)
        return max(total, choice.rows * pitch(widest_output, output_itemsize))

    choice, shared_bytes = _fit(problem, arithmetic, vector, _gradient_columns(widest), False, True, shared)
    source = KernelSource(
        "src/flash_key_gradient.cuh",
        "flash_key_gradient",
        instantiate("KeyGradientConfig", choice.config, grad_key, grad_value, additional_rows),
        "FlashKeyGradientArguments",
        choice.threads,
        _min_blocks(choice, 2 if widest <= 256 else 1),
        shared_bytes,
    )
    return Plan(choice, source, shared_bytes)


def without_windows(problem: Problem) -> Problem:
    """The map as additional keys see it: every query, whatever its window, dilation group and bias."""
    axes = tuple(Axis(axis.length, window=1) for axis in problem.axes)
    return Problem(
        problem.batch,
        axes,
        problem.heads,
        problem.key_heads,
        problem.head_dim,
        problem.value_dim,
        problem.scale,
        problem.dtype,
        problem.device,
        problem.additional,
    )


def _gradient_columns(widest: int) -> int:
    return 64 if widest <= 128 else 32 if widest <= 256 else 16 if widest <= 512 else 8


def _pitches(choice: Choice) -> tuple[int, int]:
    itemsize = choice.arithmetic.itemsize
    return pitch(choice.head_dim, itemsize), pitch(choice.value_dim, itemsize)


def _windows(choice: Choice) -> int:
    return 3 * (choice.rows + 2 * (choice.rows // WARP_ROWS)) * INTERVAL_BYTES


def _bias_bytes(problem: Problem, choice: Choice) -> int:
    return rpb_entries(problem) * 4 if choice.bias == "SHARED" else 0


def _min_blocks(choice: Choice, with_64_rows: int) -> int:
    return with_64_rows if choice.rows == 64 else 1


def _fit(
    problem: Problem,
    arithmetic: Arithmetic,
    vector: int,
    columns: int,
    resident: bool,
    inverse: bool,
    shared: Callable[[Choice], int],
) -> tuple[Choice, int]:
    """The first of the arrangements, best first, that fits into shared memory."""
    tokens = math.prod(axis.group_length(0) for axis in problem.axes)
    most_rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    biases = ["NONE"] if not problem.has_rpb else ["GLOBAL"]
    if problem.has_rpb and rpb_entries(problem) * 4 <= BIAS_LIMIT:
        biases.insert(0, "SHARED")
    for rows in (64, 32, 16):
        if rows > most_rows:
            continue
        tiling = choose_tiling(problem.axes, rows, columns, inverse)
        for stages in (2, 1):
            for bias in biases:
                choice = Choice(
                    arithmetic,
                    problem.head_dim,
                    problem.value_dim,
                    tiling,
                    problem.rank,
                    stages,
                    vector,
                    resident,
                    bias,
                    problem.rpb_dtype,
                    problem.additional > 0,
                )
                needed = shared(choice)
                if needed <= SHARED_LIMIT:
                    return choice, needed
    raise AssertionError(f"no arrangement of a flash kernel fits {SHARED_LIMIT} bytes: {problem}")
