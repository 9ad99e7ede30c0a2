"""What is timed side by side: this project's backends, and the peers a user would pick instead.

A method turns a case's inputs into two calls: `forward`, and `backward` through an already computed forward. Inputs are
heads last, as the operator takes them; a peer that wants another layout gets it beforehand, so that its time holds no
copy that it could avoid.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.cases import DTYPES, Case


class Unsupported(Exception):
    """The method does not serve this case; the text says why."""


@dataclass(frozen=True)
class Inputs:
    """One set of operands: query, key, value and grad_output `[batch, *space, heads, head_dim]`, rpb or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    rpb: Tensor | None


@dataclass(frozen=True)
class Prepared:
    """Calls on one set of inputs; `backward` is None where only the forward pass is wanted."""

    forward: Callable[[], Tensor]
    backward: Callable[[], object] | None


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


def _with_backward(
    forward: Callable[[], Tensor], leaves: list[Tensor], grad_output: Tensor, gradient: bool
) -> Prepared:
    if not gradient:

        def without_graph() -> Tensor:
            with torch.no_grad():
                return forward()

        return Prepared(without_graph, None)
    output = forward()

    def backward() -> object:
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

    return Prepared(forward, backward)


def _ours(backend: str | None) -> Callable[[Case, Inputs, bool], Prepared]:
    def prepare(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
        def forward() -> Tensor:
            return kernels.neighborhood_attention(
                inputs.query, inputs.key, inputs.value, case.window, dilation=case.dilation, stride=case.stride,
                is_causal=case.causal, rpb=inputs.rpb, backend=backend,
            )  # fmt: skip

        leaves = [inputs.query, inputs.key, inputs.value] + ([inputs.rpb] if inputs.rpb is not None else [])
        return _with_backward(forward, leaves, inputs.grad_output, gradient)

    return prepare


def _nondeterministic(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """`fused`, where gradients need not be the same bits every time."""
    prepared = _ours("fused")(case, inputs, gradient)
    deterministic_backward = prepared.backward
    if deterministic_backward is None:
        raise Unsupported("the forward pass is that of fused")

    def backward() -> object:
        kernels.set_deterministic(False)
        try:
            return deterministic_backward()
        finally:
            kernels.set_deterministic(True)

    return Prepared(prepared.forward, backward)


def _dense(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """PyTorch's dense attention over all tokens, its own choice of kernel: the cost that a window saves. No bias."""
    query, key, value, grad_output = (
        x.detach().flatten(1, -3).transpose(1, 2).contiguous()
        for x in (inputs.query, inputs.key, inputs.value, inputs.grad_output)
    )
    leaves = [query, key, value]
    for leaf in leaves:
        leaf.requires_grad_(gradient)
    return _with_backward(lambda: F.scaled_dot_product_attention(query, key, value), leaves, grad_output, gradient)


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


def _flex(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """FlexAttention, compiled, with the neighborhood mask, tokens in tile order. No bias, which only helps it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = inputs.query.device
    if device.type != "cuda":
        raise Unsupported("FlexAttention is timed on CUDA only")
    if case.head_dim < 16:
        raise Unsupported("FlexAttention needs a head_dim of 16 or more")
    order = _tile_order(case.space, case.dilation, device)
    coordinates = torch.stack(torch.unravel_index(order, case.space))
    axes = case.problem(device).axes
    tokens = order.numel()
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

    block_mask = create_block_mask(mask, None, None, tokens, tokens, device=device, _compile=tokens > 16384)
    attention = torch.compile(flex_attention, dynamic=False)
    query, key, value, grad_output = (
        x.detach().flatten(1, -3)[:, order].transpose(1, 2).contiguous()
        for x in (inputs.query, inputs.key, inputs.value, inputs.grad_output)
    )
    leaves = [query, key, value]
    for leaf in leaves:
        leaf.requires_grad_(gradient)
    return _with_backward(lambda: attention(query, key, value, block_mask=block_mask), leaves, grad_output, gradient)


def _natten(case: Case, inputs: Inputs, gradient: bool) -> Prepared:
    """NATTEN's own operator, where it can be imported. It has had no bias since 2025."""
    try:
        natten = importlib.import_module("natten")
    except ImportError as error:
        raise Unsupported(f"natten cannot be imported: {error}") from error
    operator = getattr(natten, f"na{len(case.space)}d")
    leaves = [x.detach().contiguous().requires_grad_(gradient) for x in (inputs.query, inputs.key, inputs.value)]
    options = {"kernel_size": case.window, "dilation": case.dilation, "stride": case.stride, "is_causal": case.causal}
    return _with_backward(lambda: operator(*leaves, **options), leaves, inputs.grad_output, gradient)


METHODS: dict[str, Callable[[Case, Inputs, bool], Prepared]] = {
    "fused": _ours("fused"),
    "nondeterministic": _nondeterministic,
    "gemm": _ours("gemm"),
    "naive": _ours("naive"),
    "native": _ours("native"),
    "tiled": _ours("tiled"),
    "flex": _flex,
    "dense": _dense,
    "natten": _natten,
}
BACKENDS = ("fused", "gemm", "naive", "native", "tiled")


def sampled_error(case: Case, inputs: Inputs, output: Tensor, samples: int = 64) -> float:
    """`||out - ref|| / ||ref||` over `samples` random queries, the reference computed query by query in float64.

    Works at any size: nothing larger than the sampled windows is computed.
    """
    device = output.device
    problem = case.problem(device)
    generator = torch.Generator().manual_seed(0)
    heads = torch.arange(case.heads, device=device)
    wrong, whole = 0.0, 0.0
    for _ in range(samples):
        item = int(torch.randint(case.batch, (1,), generator=generator))
        token = [int(torch.randint(n, (1,), generator=generator)) for n in case.space]
        keys, offsets = [], []
        for axis, i in zip(problem.axes, token, strict=True):
            group, position = i % axis.dilation, i // axis.dilation
            start, end = axis.window_at(position, axis.group_length(group))
            positions = torch.arange(start, end, device=device)
            keys.append(positions * axis.dilation + group)
            offsets.append(positions - position + axis.window - 1)
        key, value = (
            x.detach()[item][torch.meshgrid(*keys, indexing="ij")].flatten(0, -3).double()
            for x in (inputs.key, inputs.value)
        )
        scores = torch.einsum("hd,nhd->hn", inputs.query.detach()[(item, *token)].double(), key) * problem.scale
        if inputs.rpb is not None:
            grid = torch.meshgrid(*offsets, indexing="ij")
            scores = scores + inputs.rpb.detach().double()[(heads[:, None], *(g.flatten()[None] for g in grid))]
        expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), value)
        wrong += float((output.detach()[(item, *token)].double() - expected).square().sum())
        whole += float(expected.square().sum())
    return (wrong / whole) ** 0.5
