"""What hopper_backward and hopper_joint need of every query besides its vectors. See src/hopper_statistics.cuh."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cuda import bound
from kernels.cuda.arguments import (
    GEOMETRY,
    INT,
    POINTER,
    TENSOR,
    Struct,
    address,
    aligned,
    pack_contiguous,
    pack_geometry,
    pack_tensor,
)
from kernels.cuda.jit import KernelSource, instantiate
from kernels.problem import Problem

HOPPER_STATISTICS = Struct(
    "HopperStatisticsArguments",
    header="src/hopper_statistics.cuh",
    geometry=GEOMETRY,
    output=TENSOR,
    grad_output=TENSOR,
    lse=POINTER,
    grad_lse=POINTER,
    statistics=POINTER,
    blocks=INT,
)
_set = HOPPER_STATISTICS.pointers()

ARCHITECTURES = ("sm_90a",)
CHANNELS = 4  # floats per query
_THREADS = 256


def like(problem: Problem) -> Tensor:
    """A meta tensor like the statistics, `[batch, *space, heads, 4]`: lse times log2(e), delta, two zeros; float32."""
    return torch.empty((problem.batch, *problem.space, problem.heads, CHANNELS), dtype=torch.float32, device="meta")


def bind(problem: Problem, grad_output: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """A function of output, lse, grad_output and grad_lse that computes the statistics."""
    lanes = next(lanes for lanes in (2, 4, 8, 16, 32) if 8 * lanes >= problem.head_dim)
    blocks = -(-problem.tokens * problem.heads * lanes // _THREADS)
    packed = HOPPER_STATISTICS.pack(
        geometry=pack_geometry(problem),
        output=pack_contiguous(problem, problem.heads, problem.value_dim),
        grad_output=pack_tensor(grad_output.stride(), problem.rank),
        blocks=blocks,
    )
    source = _source(problem.dtype, problem.head_dim)
    launch = bound.Launch(source, problem.batch * blocks, 0, packed, _set).bind(problem.device)
    new_statistics = bound.new(like(problem).shape, torch.float32, problem.device)

    def call(output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None) -> Tensor:
        output, lse = aligned(output.contiguous()), lse.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        statistics = new_statistics()
        launch(*map(address, (output, grad_output, lse, grad_lse, statistics)))
        return statistics

    return call


def _source(dtype: torch.dtype, head_dim: int) -> KernelSource:
    return KernelSource(
        "src/hopper_statistics.cuh",
        "hopper_statistics",
        instantiate("HopperStatisticsConfig", dtype, head_dim, _THREADS),
        "HopperStatisticsArguments",
        _THREADS,
    )


def representative_sources() -> list[KernelSource]:
    """For the compile check; sm_90a only."""
    return [_source(dtype, 128) for dtype in (torch.float16, torch.bfloat16)]
