"""LayerNorm over the last axis of contiguous tensors: what kernels/layer_norm.py calls where there is a device.

PyTorch gives every row a block of its own, which suits rows of thousands of channels; NAT's have 64 to 512. Here a row
is held by as few lanes as read it in vectors of 16 bytes, and a block takes many. Both directions move every byte once,
so memory is what they should wait for. Gradients of weight and bias come in parts, one a block, and are summed in a
fixed order: the same bits every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cuda import bound, runtime
from kernels.cuda.arguments import FLOAT, INT, POINTER, Struct, address
from kernels.cuda.bound import Launch
from kernels.cuda.jit import KernelSource, instantiate

THREADS = 256
SUM_THREADS = 1024
WARP = 32
MAX_CHANNELS = 2048
MAX_ROWS = 1 << 30  # so that a block's step past the last row is no overflow
FORWARD_ELEMENTS = 32  # of a row that a lane holds at most, and of all its rows
BACKWARD_ELEMENTS = {8: 24, 4: 16}  # by unit; here the sums over rows want two registers more for each
BACKWARD_STEP = 16
MOST_ROWS = 4  # that a lane holds at once
BLOCKS = 2  # of the backward pass that an SM holds
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

FORWARD = Struct(
    "LayerNormForwardArguments",
    "src/layer_norm_forward.cuh",
    x=POINTER,
    weight=POINTER,
    bias=POINTER,
    output=POINTER,
    mean=POINTER,
    rstd=POINTER,
    rows=INT,
    eps=FLOAT,
)
BACKWARD = Struct(
    "LayerNormBackwardArguments",
    "src/layer_norm_backward.cuh",
    grad_output=POINTER,
    x=POINTER,
    weight=POINTER,
    mean=POINTER,
    rstd=POINTER,
    grad_x=POINTER,
    parts=POINTER,
    rows=INT,
)
SUMS = Struct(
    "LayerNormSumsArguments",
    "src/layer_norm_sums.cuh",
    parts=POINTER,
    grad_weight=POINTER,
    grad_bias=POINTER,
    count=INT,
    channels=INT,
)
_set_forward = FORWARD.pointers()
_set_backward = BACKWARD.pointers()
_set_sums = SUMS.pointers()


@dataclass(frozen=True, slots=True)
class Norm:
    """What is normalised: `rows` of `channels`, from `dtype` to `output_dtype`; weight and bias have `weight_dtype`."""

    rows: int
    channels: int
    dtype: torch.dtype
    output_dtype: torch.dtype
    weight_dtype: torch.dtype
    eps: float
    device: torch.device

    @property
    def unit(self) -> int:
        """Channels of a vector: see LayerNormConfig."""
        return 8 if self.dtype.itemsize == self.output_dtype.itemsize == 2 else 4


def why_not(norm: Norm) -> str | None:
    """Why these kernels do not serve, in one sentence; None if they do."""
    for dtype in (norm.dtype, norm.output_dtype, norm.weight_dtype):
        if dtype not in DTYPES:
            return f"it computes in float32, float16 and bfloat16, not in {dtype}"
    if norm.channels % norm.unit or not 0 < norm.channels <= MAX_CHANNELS:
        return f"{norm.channels} channels are not a multiple of {norm.unit} from {norm.unit} to {MAX_CHANNELS}"
    if not 0 < norm.rows <= MAX_ROWS:
        return f"{norm.rows} rows are not from 1 to {MAX_ROWS}"
    served = runtime.installed_runtime(norm.device)
    if served is None:
        return f"it runs on CUDA devices; the tensors are on {norm.device}"
    return served.why_not(norm.device)


@dataclass(frozen=True, slots=True)
class Tile:
    """How many lanes hold a row, and how many rows a lane holds at once."""

    lanes: int
    rows: int

    @property
    def block_rows(self) -> int:
        return THREADS // self.lanes * self.rows

    @property
    def kept(self) -> int:
        """Rows of sums that a block of the backward pass ends with: see LAYER_NORM_KEPT."""
        return THREADS // max(self.lanes, WARP)


@functools.lru_cache(maxsize=1024)
def choose_tile(channels: int, unit: int, elements: int, step: int) -> Tile:
    """The lanes that leave the fewest idle while each holds at most `elements` of a row; then those nearest to a warp.

    Rows are as many as make `step` elements. A row is read in stretches of four lanes or more: two sectors of 32 bytes.
    """
    vectors = channels // unit

    def of_a_lane(lanes: int) -> int:
        return -(-vectors // lanes)

    counts = [2**power for power in range(8) if of_a_lane(2**power) * unit <= elements]
    candidates = [lanes for lanes in counts if lanes >= min(4, vectors)]
    lanes = min(candidates, key=lambda lanes: (lanes * of_a_lane(lanes), max(lanes / WARP, WARP / lanes)))
    return Tile(lanes, max(1, min(MOST_ROWS, step // (of_a_lane(lanes) * unit))))


def _source(direction: str, norm: Norm, tile: Tile, shared_bytes: int, min_blocks: int = 1) -> KernelSource:
    types = norm.dtype, norm.output_dtype, norm.weight_dtype
    config = instantiate("LayerNormConfig", *types, norm.channels, tile.lanes, tile.rows, THREADS)
    return KernelSource(
        f"src/layer_norm_{direction}.cuh",
        f"layer_norm_{direction}",
        config,
        f"LayerNorm{direction.capitalize()}Arguments",
        THREADS,
        min_blocks,
        shared_bytes,
    )


def forward_launch(norm: Norm) -> Launch:
    """Takes the addresses of x, weight, bias, output, mean and rstd; null for the last two where nobody wants them."""
    tile = choose_tile(norm.channels, norm.unit, FORWARD_ELEMENTS, FORWARD_ELEMENTS)
    shared_bytes = 2 * 4 * tile.rows * THREADS // WARP if tile.lanes > WARP else 0
    packed = FORWARD.pack(rows=norm.rows, eps=norm.eps)
    grid = -(-norm.rows // tile.block_rows)
    return Launch(_source("forward", norm, tile, shared_bytes), grid, shared_bytes, packed, _set_forward)


def backward_launch(norm: Norm, multiprocessors: int) -> Launch:
    """Takes the addresses of grad_output, x, weight, mean, rstd, grad_x and parts, `[parts, 2, channels]` in float32.

    Null for the last where neither weight nor bias has a gradient.
    """
    tile = choose_tile(norm.channels, norm.unit, BACKWARD_ELEMENTS[norm.unit], BACKWARD_STEP)
    shared_bytes = 4 * (4 * tile.rows * THREADS // WARP + tile.kept * 2 * norm.channels)
    blocks = min(-(-norm.rows // tile.block_rows), BLOCKS * multiprocessors)
    source = _source("backward", norm, tile, shared_bytes, BLOCKS)
    return Launch(source, blocks, shared_bytes, BACKWARD.pack(rows=norm.rows), _set_backward, blocks)


def sums_launch(dtype: torch.dtype, parts: int, channels: int) -> Launch:
    """Takes the addresses of parts and of the gradients of weight and bias, null for one that nobody wants."""
    config = instantiate("LayerNormSumsConfig", dtype, SUM_THREADS)
    shared_bytes = 4 * SUM_THREADS
    source = KernelSource(
        "src/layer_norm_sums.cuh",
        "layer_norm_sums",
        config,
        "LayerNormSumsArguments",
        SUM_THREADS,
        shared_bytes=shared_bytes,
    )
    packed = SUMS.pack(count=parts, channels=channels)
    return Launch(source, -(-2 * channels // WARP), shared_bytes, packed, _set_sums)


Forward = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]
"""Of x, weight and bias: the output; and mean and rstd, `[2, rows]`, where a gradient will be asked for."""

Backward = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""Of grad_output, x, weight, and mean and rstd: the gradients of x, weight and bias."""


def bind_forward(norm: Norm, shape: torch.Size, keeps_statistics: bool) -> Forward:
    """For contiguous tensors `shape` at addresses that are multiples of 16 bytes."""
    launch = forward_launch(norm).bind(norm.device)
    new_output = bound.new(shape, norm.output_dtype, norm.device)
    new_statistics = bound.new((2, norm.rows), torch.float32, norm.device)
    to_rstd = 4 * norm.rows

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        output = new_output()
        parameters = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        if not keeps_statistics:
            launch(x.data_ptr(), *parameters, output.data_ptr(), 0, 0)
            return output, None
        statistics = new_statistics()
        mean = statistics.data_ptr()
        launch(x.data_ptr(), *parameters, output.data_ptr(), mean, mean + to_rstd)
        return output, statistics

    return call


def bind_backward(norm: Norm, shape: torch.Size, needs_weight: bool, needs_bias: bool) -> Backward:
    """For tensors like those of `bind_forward`."""
    planned = backward_launch(norm, runtime.properties(norm.device).multiprocessors)
    launch = planned.bind(norm.device)
    new_gradient = bound.new(shape, norm.dtype, norm.device)
    new_parts = bound.new((planned.parts, 2, norm.channels), torch.float32, norm.device)
    new_sum = bound.new((norm.channels,), norm.weight_dtype, norm.device)
    to_rstd = 4 * norm.rows
    needs_sums = needs_weight or needs_bias
    add_up = sums_launch(norm.weight_dtype, planned.parts, norm.channels).bind(norm.device) if needs_sums else None

    def call(
        grad_output: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        grad_x = new_gradient()
        parts = None if add_up is None else new_parts()
        mean, read = statistics.data_ptr(), map(address, (grad_output, x, weight))
        launch(*read, mean, mean + to_rstd, grad_x.data_ptr(), address(parts))
        if add_up is None:
            return grad_x, None, None
        grad_weight, grad_bias = new_sum() if needs_weight else None, new_sum() if needs_bias else None
        add_up(*map(address, (parts, grad_weight, grad_bias)))
        return grad_x, grad_weight, grad_bias

    return call


def representative_sources() -> Iterable[KernelSource]:
    """Kernels that must compile without a spill on every architecture."""
    full, half, brain = DTYPES
    cases = [
        *((channels, (brain, brain, brain)) for channels in (64, 96, 128, 256, 384, 512, 768, 1024, 1536, 2048)),
        *((channels, (brain, brain, full)) for channels in (64, 512, 2048)),
        *((channels, (brain, full, full)) for channels in (64, 512, 2048)),
        *((channels, (full, brain, full)) for channels in (64, 96, 512, 2048)),
        *((channels, (full, full, full)) for channels in (64, 96, 512, 1024, 2048)),
        (32, (half, half, half)),
    ]
    for channels, types in cases:
        norm = Norm(1 << 20, channels, *types, 1e-5, torch.device("cuda"))
        yield forward_launch(norm).source
        yield backward_launch(norm, 132).source
    for dtype in DTYPES:
        yield sums_launch(dtype, 264, 512).source
