"""What a whole model must move and compute: its operators one by one, on tensors without data, and their floors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

import models  # noqa: F401  registers the zoo with timm
from benchmarks import floors
from benchmarks.models import image_size
from kernels.problem import Axis, Problem

KINDS = {
    "addmm": "linear",
    "mm": "linear",
    "bmm": "attention",
    "convolution": "convolution",
    "native_layer_norm": "layer norm",
    "gelu": "GELU",
    "add": "residual",
    "mul": "LayerScale",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
}
NO_COPY = ("_unsafe_view", "lift_fresh", "detach")
COLUMNS = ["stage", "kind", "calls", "MB", "GFLOP", "floor us"]


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Ledger(TorchDispatchMode):
    """Books every operator that is no view: the stage it belongs to, its kind, bytes read and written, operations."""

    def __init__(self) -> None:
        super().__init__()
        self.modules = ModuleTracker()
        self.entries: list[tuple[str, str, float, float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or name in NO_COPY:
            return output
        operands, results = _tensors((args, kwargs)), _tensors(output)
        ours = func.namespace == "fastna"
        if ours or name == "native_layer_norm":
            results = results[:1]  # lse, mean and deviation are for a backward pass, and small
        read = float(sum(x.numel() * x.element_size() for x in operands))
        written = float(sum(x.numel() * x.element_size() for x in results))
        flops = 0.0
        if func._overloadpacket in flop_registry:
            flops = float(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=output))
        elif ours:
            flops = _attention_flops(args, kwargs or {}, func)
        kind = "attention" if ours else KINDS.get(name, "other")
        self.entries.append((self._stage(), kind, read, written, flops))
        return output

    def _stage(self) -> str:
        """The part of the model that runs now: `levels.0`, `patch_embed`, `head`."""
        deepest = max(self.modules.parents, key=len)
        parts = deepest.split(".")[1:]
        return ".".join(parts[:2] if len(parts) > 1 and parts[1].isdigit() else parts[:1]) or "-"


def _attention_flops(args: Sequence[Any], kwargs: dict[str, Any], func: Any) -> float:
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    query = named["query"]
    batch, *space, heads, head_dim = query.shape
    axes = tuple(map(Axis, space, named["window"], named["dilation"], named["stride"], named["is_causal"]))
    return floors.forward_flops(
        Problem(batch, axes, heads, heads, head_dim, head_dim, head_dim**-0.5, query.dtype, query.device)
    )


def account(name: str, batch: int, dtype: torch.dtype, ceilings: floors.Ceilings) -> pd.DataFrame:
    """One row per stage and kind of operator of a forward pass, in the order of the model, columns as in `COLUMNS`.

    The floor of an operator is the larger of its bytes over the memory bandwidth and its operations over the matrix
    rate; nothing is assumed to stay in a cache between two operators, and launches cost nothing.
    """
    with torch.device("meta"):
        model = timm.create_model(name).eval().to(dtype)
        side = image_size(name)
        images = torch.empty(batch, 3, side, side, dtype=dtype)
    ledger = _Ledger()
    with torch.no_grad(), ledger.modules, ledger:
        model(images)
    rows = [
        (stage, kind, 1, (read + written) / 1e6, flops / 1e9,
         1e6 * max((read + written) / ceilings.bytes_per_second, flops / ceilings.flops_per_second[dtype]))
        for stage, kind, read, written, flops in ledger.entries
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS).groupby(["stage", "kind"], sort=False).sum().reset_index()


def fused_seconds(table: pd.DataFrame, ceilings: floors.Ceilings) -> float:
    """The floor where a compiler joins every residual addition with the layer norm behind it: its input is not read."""
    norms = table[table["kind"] == "layer norm"]["MB"].sum() * 1e6 / 2
    return float(table["floor us"].sum() / 1e6 - norms / ceilings.bytes_per_second)
