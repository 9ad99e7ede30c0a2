"""From tensors and arguments to a `Problem`, or to an error that names argument, value, rule and fix."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from kernels.problem import MAX_RANK, Axis, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IntPerAxis = int | Sequence[int]
BoolPerAxis = bool | Sequence[bool]


def rank_of(query: Tensor, rank: int | None) -> int:
    """Rank of the space that `query` spans; `rank` is what the caller promised, if anything."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a Tensor, not {type(query).__name__}")
    if rank is None:
        rank = query.dim() - 3
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(
                f"query has {query.dim()} dimensions {tuple(query.shape)}; [batch, *space, heads, head_dim] with a "
                f"space of 1 to {MAX_RANK} axes has 4 to {MAX_RANK + 3}"
            )
    elif query.dim() != rank + 3:
        raise ValueError(
            f"query has {query.dim()} dimensions {tuple(query.shape)}; na{rank}d takes {rank + 3}: [batch, *space, "
            f"heads, head_dim] with a space of {rank} axes (neighborhood_attention takes any rank)"
        )
    return rank


def ints_per_axis(name: str, value: IntPerAxis, rank: int) -> tuple[int, ...]:
    """`value` as one int per axis."""
    if type(value) is int:
        return (value,) * rank
    return _per_axis(name, value, rank, int, "an int")


def bools_per_axis(name: str, value: BoolPerAxis, rank: int) -> tuple[bool, ...]:
    """`value` as one bool per axis."""
    if type(value) is bool:
        return (value,) * rank
    return _per_axis(name, value, rank, bool, "a bool")


def _per_axis(name: str, value: Any, rank: int, kind: type, called: str) -> tuple[Any, ...]:
    """`value` as `rank` items of Python's own `kind`; NumPy's ints and any sequence are taken too."""
    listed = type(value) is tuple or (isinstance(value, Sequence) and not isinstance(value, str))
    items = tuple([item if type(item) is kind else _plain(item, kind) for item in (value if listed else (value,))])
    if None in items:
        raise TypeError(f"{name}={value!r} must be {called}, or a tuple of {rank} of them, one per axis of the space")
    if not listed:
        return items * rank
    if len(items) != rank:
        raise ValueError(
            f"{name}={value!r} has {len(items)} items, the space has {rank} axes; give one per axis, or {called} for "
            f"all"
        )
    return items


def _plain(item: Any, kind: type) -> int | None:
    """`item` as an int, if one is wanted and it is one in all but type; a bool is none."""
    # Of torch.SymInt too: a window as long as an axis of an exported program fixes that axis.
    is_int = isinstance(item, (Integral, torch.SymInt)) and not isinstance(item, bool)
    return operator.index(item) if kind is int and is_int else None


def scale_of(scale: float | None, query: Tensor) -> float:
    """`scale`, or `head_dim ** -0.5` where it is None."""
    if scale is None:
        return max(query.size(-1), 1) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale={scale!r} must be a float, or None for head_dim ** -0.5, not {type(scale).__name__}")
    return float(scale)


_STRIDED = torch.strided
OPERANDS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


def require_tensors(*operands: Tensor | None) -> None:
    """That every operand given, in the order of `OPERANDS`, is a dense Tensor, and that the first three are given."""
    if operands[1] is None or operands[2] is None:
        raise TypeError(f"{'value' if operands[2] is None else 'key'} must be a Tensor, not NoneType")
    for tensor in operands:
        if tensor is not None and getattr(tensor, "layout", None) is not _STRIDED:
            name = next(name for name, other in zip(OPERANDS, operands, strict=True) if other is tensor)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
            raise TypeError(
                f"{name} has layout {tensor.layout}; only dense (torch.strided) tensors are taken: call "
                f"{name}.to_dense()"
            )


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    window: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Problem:
    """The `Problem` of a call; ValueError or TypeError if it is none. Cached by shapes and arguments."""
    return _describe(
        *_key(query, key, value, rpb, additional_keys, additional_values),
        tuple(window),
        tuple(dilation),
        tuple(stride),
        tuple(is_causal),
        scale,
    )


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    window: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> None:
    """As `describe`, for tensors whose sizes may be symbolic: those cannot be hashed, so nothing is cached."""
    metadata = _key(query, key, value, rpb, additional_keys, additional_values)
    _describe.__wrapped__(*metadata, tuple(window), tuple(dilation), tuple(stride), tuple(is_causal), scale)


_Metadata = tuple[tuple[int, ...], torch.dtype, torch.device]


def _key(*tensors: Tensor | None) -> tuple[_Metadata | None, ...]:
    return tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])


@lru_cache(maxsize=4096)
def _describe(
    query: _Metadata,
    key: _Metadata,
    value: _Metadata,
    rpb: _Metadata | None,
    additional_keys: _Metadata | None,
    additional_values: _Metadata | None,
    window: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
) -> Problem:
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be finite")
    shape, dtype, device = query
    _check_dtypes_and_devices(
        query, key=key, value=value, additional_keys=additional_keys, additional_values=additional_values
    )
    _check_shapes(shape, key[0], value[0])
    batch, *space, heads, head_dim = shape
    key_heads, value_dim = value[0][-2:]
    axes = tuple(
        _axis(index, *axis) for index, axis in enumerate(zip(space, window, dilation, stride, is_causal, strict=True))
    )
    additional = _additional(additional_keys, additional_values, batch, key_heads, head_dim, value_dim)
    problem = Problem(
        batch=batch,
        axes=axes,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=scale,
        dtype=dtype,
        device=device,
        additional=additional,
        rpb_dtype=None if rpb is None else rpb[1],
    )
    if rpb is not None:
        _check_rpb(rpb, problem)
    return problem


def _check_dtypes_and_devices(query: _Metadata, **others: _Metadata | None) -> None:
    _, dtype, device = query
    if dtype not in DTYPES:
        raise TypeError(
            f"query has dtype {dtype}; it must be one of {', '.join(map(str, DTYPES))}: convert it with .to(...)"
        )
    for name, other in others.items():
        if other is None:
            continue
        if other[1] != dtype:
            raise TypeError(f"{name} has dtype {other[1]}, query has {dtype}; they must agree: {name}.to({dtype})")
        if other[2] != device:
            raise ValueError(
                f"{name} is on {other[2]}, query on {device}; they must be on one device: {name}.to({str(device)!r})"
            )


def _check_shapes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
    rank = len(query) - 3
    layout = "[batch, *space, heads, head_dim]"
    for name, shape in (("key", key), ("value", value)):
        if len(shape) != len(query):
            raise ValueError(
                f"{name} has {len(shape)} dimensions {tuple(shape)}, query has {len(query)}; both are {layout}"
            )
        if shape[: rank + 1] != query[: rank + 1]:
            raise ValueError(
                f"{name} has batch and space {tuple(shape[: rank + 1])}, query has {tuple(query[: rank + 1])}; they "
                f"must be equal in the layout {layout} (heads after the space)"
            )
    if key[-2] != value[-2]:
        raise ValueError(
            f"key has {key[-2]} heads, value has {value[-2]}; they must have as many heads, in the layout {layout}"
        )
    if key[-1] != query[-1]:
        raise ValueError(f"key has head_dim {key[-1]}, query has {query[-1]}; they must be equal (value's may differ)")
    for name, size in (
        ("heads", query[-2]),
        ("head_dim", query[-1]),
        ("key heads", key[-2]),
        ("value head_dim", value[-1]),
    ):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1, in the layout {layout}")
    if query[-2] % key[-2]:
        raise ValueError(
            f"query has {query[-2]} heads, key and value have {key[-2]}; the heads of query must be a multiple of "
            f"theirs (each key head serves equally many query heads)"
        )


def _axis(index: int, length: int, window: int, dilation: int, stride: int, causal: bool) -> Axis:
    here = f"axis {index} of length {length}"
    if window < 1:
        raise ValueError(f"kernel_size={window} on {here}: it must be at least 1")
    if dilation < 1:
        raise ValueError(f"dilation={dilation} on {here}: it must be at least 1")
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride={stride} on {here}: it must lie between 1 and kernel_size={window}, else keys fall between windows"
        )
    if window > length:
        raise ValueError(
            f"kernel_size={window} with dilation={dilation} on {here}: the window is larger than the axis; "
            + (f"take kernel_size <= {max(length // dilation, 1)}" if length else "the axis must not be empty")
            + (" and dilation = 1" if dilation > length > 0 else "")
        )
    if window * dilation > length:
        raise ValueError(
            f"kernel_size={window} with dilation={dilation} on {here}: kernel_size * dilation = {window * dilation} "
            f"must not exceed the length; take "
            + (f"kernel_size <= {length // dilation} or " if dilation <= length else "")
            + f"dilation <= {length // window}"
        )
    return Axis(length, window, dilation, stride, causal)


def _additional(
    keys: _Metadata | None, values: _Metadata | None, batch: int, key_heads: int, head_dim: int, value_dim: int
) -> int:
    if keys is None and values is None:
        return 0
    if keys is None or values is None:
        given, missing = ("additional_keys", "additional_values")[:: 1 if values is None else -1]
        raise ValueError(f"{given} came without {missing}; give both or neither")
    for name, shape, dim in (("additional_keys", keys[0], head_dim), ("additional_values", values[0], value_dim)):
        if len(shape) != 4 or shape[0] != batch or shape[2:] != (key_heads, dim):
            raise ValueError(
                f"{name} has shape {tuple(shape)}; it must be [batch, n, key heads, dim] = [{batch}, n, {key_heads}, "
                f"{dim}]"
            )
    if keys[0][1] != values[0][1]:
        raise ValueError(
            f"additional_keys has {keys[0][1]} keys, additional_values has {values[0][1]} values; they must be as many"
        )
    return keys[0][1]


def _check_rpb(rpb: _Metadata, problem: Problem) -> None:
    shape, dtype, device = rpb
    if tuple(shape) != problem.rpb_shape:
        raise ValueError(
            f"rpb has shape {tuple(shape)}; for {problem.heads} heads and kernel_size={problem.window} it must be "
            f"[heads, 2 * kernel_size - 1, ...] = {problem.rpb_shape}"
        )
    if dtype not in (problem.dtype, problem.accumulation_dtype):
        legal = " or ".join(dict.fromkeys((str(problem.dtype), str(problem.accumulation_dtype))))
        raise TypeError(
            f"rpb has dtype {dtype}; with a query of {problem.dtype} it must be {legal}: rpb.to({problem.dtype})"
        )
    if device != problem.device:
        raise ValueError(
            f"rpb is on {device}, query on {problem.device}; they must be on one device: "
            f"rpb.to({str(problem.device)!r})"
        )
