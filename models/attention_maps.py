"""What a layer looks at: the attention weights of chosen queries, to be drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import na2d
from models.layers import NeighborhoodAttention, fit_rpb


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the layers that `attention_maps` can look into, from the image to the head."""
    return [name for name, module in model.named_modules() if isinstance(module, NeighborhoodAttention)]


@torch.no_grad()
def attention_maps(
    model: nn.Module, images: Tensor, layer: str | int = -1, queries: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """Attention weights of `queries` in one layer, over the whole map of that layer.

    Args:
        model: any model of this zoo. It is run in evaluation mode and left in the mode it was in.
        images: `[batch, in_chans, height, width]`, normalised as for the model.
        layer: a name out of `attention_layers(model)`, or an index into that list.
        queries: (row, column) of tokens on the layer's map; None for the one in the middle.

    Returns:
        `[batch, queries, heads, map height, map width]`, float32: every map is zero outside the query's window and sums
        to 1.

    Raises:
        ValueError: for a layer that is not there, or a query that lies outside the map.
    """
    name = _named(layer, attention_layers(model))
    attention = model.get_submodule(name)
    assert isinstance(attention, NeighborhoodAttention)
    tokens = _input_of(attention, model, images)
    height, width = tokens.shape[1:3]
    queries = [(height // 2, width // 2)] if queries is None else queries
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"query ({row}, {column}) lies outside the {height} x {width} map of {name}")
    query, key, _ = (part.float() for part in attention.project(tokens))
    window, dilation = attention.window_for(height, width)
    rpb = fit_rpb(attention.rpb, window).float()
    with torch.enable_grad():
        # An output is linear in the values, and its derivative by the value of a key is the weight of that key.
        value = query.new_zeros(*query.shape[:-1], 1, requires_grad=True)
        output = na2d(query, key, value, window, dilation=dilation, rpb=rpb, backend="tiled")
        weights = [torch.autograd.grad(output[:, r, c].sum(), value, retain_graph=True)[0] for r, c in queries]
    return torch.stack(weights, dim=1).squeeze(-1).movedim(-1, 2)


def _named(layer: str | int, names: list[str]) -> str:
    if isinstance(layer, str) and layer in names:
        return layer
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return names[layer]
    raise ValueError(f"layer = {layer!r}: the model has {len(names)} attention layers, named {', '.join(names)}")


def _input_of(attention: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """What `attention` is given when `model` sees `images`."""
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    training = model.training
    try:
        model.eval()(images)
    finally:
        hook.remove()
        model.train(training)
    return seen[0]
