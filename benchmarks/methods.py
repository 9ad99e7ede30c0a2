"""What is timed side by side: this project's backends, and the peers a user would pick instead.

A method turns a case's inputs into two calls: `forward`, and `backward` through an already computed forward. Inputs are
heads last, as the operator takes them; a peer that wants another layout gets it beforehand, so that its time holds no
copy that it could avoid.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import kernels
from benchmarks import floors
from benchmarks.cases import DTYPES, Case
from benchmarks.correctness import Answer, Inputs
from benchmarks.timing import measure
from kernels.problem import Axis

DENSE_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CPU_FLOPS = 1e11  # about a second of one forward pass


class Unsupported(Exception):
    """The method does not serve this case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    """Calls on one set of inputs, and how to judge them.

    Attributes:
        forward: gives the output, in the method's own layout.
        backward: gives the gradients of query, key and value first; None where only the forward pass is wanted.
        solves: the case that the method computes, which a peer may know only in part (no bias, no window).
        restore: brings an output or a gradient into the layout of the inputs.
        variant: which of its kernels the method runs, where that was a choice.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[], tuple[Tensor, ...]] | None
    solves: Case
    restore: Callable[[Tensor], Tensor] = lambda x: x
    variant: str = ""

    def answer(self) -> Answer:
        """Runs both calls once: the output, and the gradients of query, key and value."""
        output = self.restore(self.forward())
        gradients = self.backward() if self.backward else None
        return Answer(output, tuple(map(self.restore, gradients[:3])) if gradients else None)


def make_inputs(case: Case, device: torch.device, seed: int, gradient: bool) -> Inputs:
    """Random operands; query, key and value are slices of one packed projection, as in the models."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (case.batch, *case.space)
    dtype = DTYPES[case.dtype]
    packed = torch.randn((*shape, 3, case.heads, case.head_dim), device=device, generator=generator, dtype=dtype)
    query, key, value = (part.detach().requires_grad_(gradient) for part in packed.unbind(-3))
    grad_output = torch.randn((*shape, case.heads, case.head_dim), device=device, generator=generator, dtype=dtype)
    rpb = None
    if case.rpb:
        sizes = (case.heads, *(2 * k - 1 for k in case.window))
        rpb = torch.randn(sizes, device=device, generator=generator).requires_grad_(gradient)
    return Inputs(query, key, value, grad_output, rpb)


def _prepared(
    forward: Callable[[], Tensor], leaves: list[Tensor], grad_output: Tensor, gradient: bool, solves: Case, **facts: Any
) -> Prepared:
    if not gradient:

        def without_graph() -> Tensor:
            with torch.no_grad():
                return forward()

        return Prepared(without_graph, None, solves, **facts)
    output = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

    return Prepared(forward, backward, solves, **facts)


def _ours(backend: str) -> Callable[[Case, Inputs, bool], Prepared]:
    def prepare(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
        def forward() -> Tensor:
            return kernels.neighborhood_attention(
                inputs.query, inputs.key, inputs.value, case.window, dilation=case.dilation, stride=case.stride,
                is_causal=case.causal, rpb=inputs.rpb, backend=backend,
            )  # fmt: skip

        leaves = [inputs.query, inputs.key, inputs.value] + ([inputs.rpb] if inputs.rpb is not None else [])
        return _prepared(forward, leaves, inputs.grad_output, gradient, case)

    return prepare


def _nondeterministic(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """`fused`, where gradients need not be the same bits every time."""
    prepared = _ours("fused")(case, inputs, gradient)
    deterministic_backward = prepared.backward
    if deterministic_backward is None:
        raise Unsupported("the forward pass is that of fused")

    def backward() -> tuple[Tensor, ...]:
        kernels.set_deterministic(False)
        try:
            return deterministic_backward()
        finally:
            kernels.set_deterministic(True)

    return Prepared(prepared.forward, backward, case)


def _heads_first(inputs: Inputs, order: Tensor | None = None) -> list[Tensor]:
    """Query, key, value and grad_output as contiguous `[batch, heads, tokens, head_dim]`, tokens in `order`."""
    flat = (x.detach().flatten(1, -3) for x in (inputs.query, inputs.key, inputs.value, inputs.grad_output))
    return [(x if order is None else x[:, order]).transpose(1, 2).contiguous() for x in flat]


def _dense(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """PyTorch's dense attention over all tokens, the fastest of its kernels: the cost that a window saves. No bias."""
    device = inputs.query.device
    whole = case.replace(window=case.space, dilation=(), stride=(), causal=(), rpb=False)
    if device.type != "cuda" and floors.forward_flops(whole.problem(device)) > CPU_FLOPS:
        raise Unsupported("dense attention over so many tokens takes too long on a CPU")
    *leaves, grad_output = _heads_first(inputs)
    for leaf in leaves:
        leaf.requires_grad_(gradient)
    kinds = DENSE_KERNELS if device.type == "cuda" else {}

    def prepare(kind: SDPBackend | None, name: str) -> Prepared:
        def forward() -> Tensor:
            with sdpa_kernel(kind) if kind is not None else contextlib.nullcontext():
                return F.scaled_dot_product_attention(*leaves)

        restore = lambda x: x.transpose(1, 2).unflatten(1, case.space)  # noqa: E731
        return _prepared(forward, leaves, grad_output, gradient, whole, restore=restore, variant=name)

    timed = []
    for name, kind in kinds.items():
        # A kernel that does not serve these sizes says so by a RuntimeError, and by a warning for each reason.
        with contextlib.suppress(RuntimeError), warnings.catch_warnings(action="ignore"):
            one = prepare(kind, name)
            calls = [one.forward] + ([one.backward] if one.backward else [])
            timed.append((sum(measure({"": [call]}, device, 0, groups=3)[""].median for call in calls), name, kind))
    if not timed:
        return prepare(None, "PyTorch's choice")
    _, name, kind = min(timed, key=lambda entry: entry[0])
    return prepare(kind, name)


def _tile_order(space: tuple[int, ...], dilation: tuple[int, ...], device: torch.device) -> Tensor:
    """The tokens, each dilation group's square tiles next to each other: FlexAttention's best case."""
    sides = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}[len(space)]
    grids = torch.meshgrid(*(torch.arange(n, device=device) for n in space), indexing="ij")
    order = torch.zeros(space, dtype=torch.long, device=device)
    for grid, d in zip(grids, dilation, strict=True):
        order = order * d + grid % d
    for grid, n, d, side in zip(grids, space, dilation, sides, strict=True):
        order = order * (-(-n // d // side) + 1) + grid // d // side
    for grid, d, side in zip(grids, dilation, sides, strict=True):
        order = order * side + grid // d % side
    return order.flatten().argsort()


@functools.lru_cache(maxsize=1)
def _tile_mask(space: tuple[int, ...], axes: tuple[Axis, ...], device: torch.device) -> tuple[Tensor, BlockMask]:
    """The tile order of the tokens, and the neighborhood as FlexAttention's mask over tokens in that order."""
    torch._dynamo.reset()  # it gives up compiling a function after eight shapes
    order = _tile_order(space, tuple(axis.dilation for axis in axes), device)
    coordinates = torch.stack(torch.unravel_index(order, space))
    starts, ends, groups, positions = [], [], [], []
    for axis, coordinate in zip(axes, coordinates, strict=True):
        bounds = torch.tensor(
            [axis.window_at(i // axis.dilation, axis.group_length(i % axis.dilation)) for i in range(axis.length)],
            device=device,
        )
        starts.append(bounds[coordinate, 0].int())
        ends.append(bounds[coordinate, 1].int())
        groups.append((coordinate % axis.dilation).int())
        positions.append((coordinate // axis.dilation).int())

    def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = q >= 0
        for start, end, group, position in zip(starts, ends, groups, positions, strict=True):
            visible = visible & (group[q] == group[k]) & (position[k] >= start[q]) & (position[k] < end[q])
        return visible

    tokens = order.numel()
    # Uncompiled it holds every (query, key) pair at once.
    compiled = device.type == "cuda" and tokens > 16384
    return order, create_block_mask(mask, None, None, tokens, tokens, device=device, _compile=compiled)


def _flex(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """FlexAttention, compiled, with the neighborhood mask, tokens in tile order. No bias, which only helps it.

    Neither the tile order nor the block mask is timed: both are counted among the seconds of setting up.
    """
    device = inputs.query.device
    if device.type == "cuda" and case.head_dim < 16:
        raise Unsupported("FlexAttention needs a head_dim of 16 or more")
    if device.type != "cuda" and gradient:
        raise Unsupported("FlexAttention has no backward pass on a CPU")
    order, block_mask = _tile_mask(case.space, case.problem(device).axes, device)
    inverse = order.argsort()
    attention = torch.compile(flex_attention, dynamic=False)
    *leaves, grad_output = _heads_first(inputs, order)
    for leaf in leaves:
        leaf.requires_grad_(gradient)
    return _prepared(
        lambda: attention(*leaves, block_mask=block_mask), leaves, grad_output, gradient, case.replace(rpb=False),
        restore=lambda x: x.transpose(1, 2)[:, inverse].unflatten(1, case.space),
    )  # fmt: skip


def _natten(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """NATTEN's own operator, where it can be imported: of 2025 and later without bias, before that without stride."""
    try:
        natten = importlib.import_module("natten")
        name = f"na{len(case.space)}d"
        operator = getattr(natten, name, None) or getattr(importlib.import_module("natten.functional"), name)
    except (ImportError, AttributeError) as error:
        raise Unsupported(f"natten cannot be used: {error}") from error
    known = inspect.signature(operator).parameters
    if "stride" not in known and any(stride > 1 for stride in case.stride):
        raise Unsupported("this release of natten has no stride")
    leaves = [x.detach().contiguous().requires_grad_(gradient) for x in (inputs.query, inputs.key, inputs.value)]
    options = {"kernel_size": case.window, "dilation": case.dilation, "is_causal": case.causal}
    if "stride" in known:
        options["stride"] = case.stride
    biased = "rpb" in known and inputs.rpb is not None
    if biased:
        leaves.append(inputs.rpb.detach().to(leaves[0].dtype).requires_grad_(gradient))
        options["rpb"] = leaves[3]
    return _prepared(
        lambda: operator(*leaves[:3], **options), leaves, inputs.grad_output, gradient, case.replace(rpb=biased)
    )


METHODS: dict[str, Callable[[Case, Inputs, bool], Prepared]] = {
    "fused": _ours("fused"),
    "nondeterministic": _nondeterministic,
    "gemm": _ours("gemm"),
    "naive": _ours("naive"),
    "native": _ours("native"),
    "tiled": _ours("tiled"),
    "reference": _ours("reference"),
    "flex": _flex,
    "dense": _dense,
    "natten": _natten,
}
BACKENDS = ("fused", "gemm", "naive", "native", "tiled", "reference")


def default_methods(device: torch.device) -> tuple[str, ...]:
    """What is timed side by side on `device`. FlexAttention compiles C++ for every problem on a CPU: not by default."""
    if device.type == "cuda":
        return ("fused", "gemm", "naive", "flex", "dense", "natten")
    return ("native", "tiled", "reference", "dense")
