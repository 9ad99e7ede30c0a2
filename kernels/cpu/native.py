"""The `native` backend: loops in C++, compiled at run time for this machine's processor. See attention.cpp.

float16 and bfloat16 are computed in float32; float64 is left to `tiled`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Gradients, Operands
from kernels.cpu import build
from kernels.problem import MAX_RANK, Axis, Problem

PADDING = 16  # WIDE in layout.h
LOG2_E = math.log2(math.e)
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever PyTorch's defaults are
# A task's keys and values should stay in a core's own cache, and tasks be many enough to share out evenly.
CACHE_BYTES = 1 << 20
TASKS_PER_THREAD = 4
WORK_PER_THREAD = 1 << 17  # multiplications that are worth waking another thread for


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("axis", ctypes.c_int64 * MAX_RANK),
        ("head", ctypes.c_int64),
    )


class _Axis(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("length", "window", "dilation", "chunk")),
        ("start", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
    )


class Arguments(ctypes.Structure):
    """`Arguments` of layout.h."""

    _fields_ = (
        ("axis", _Axis * MAX_RANK),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "heads", "key_heads", "head_dim", "value_dim", "additional", "threads")
        ),
        ("scale", ctypes.c_float),
        *((n, _Tensor) for n in ("query", "key", "value", "output", "lse", "additional_key", "additional_value")),
        ("bias", ctypes.c_void_p),
        ("bias_size", ctypes.c_int64),
        *((name, _Tensor) for name in ("grad_output", "grad_lse", "grad_query", "grad_key", "grad_value")),
        *((name, ctypes.c_void_p) for name in ("grad_bias", "grad_additional_key", "grad_additional_value")),
    )

    def tensor(self, name: str, tensor: Tensor, rank: int) -> None:
        """Sets a tensor `[batch, *space, heads(, dim)]`."""
        strides = tensor.stride()
        field = getattr(self, name)
        field.data, field.batch, field.head = tensor.data_ptr(), strides[0], strides[rank + 1]
        for i in range(rank):
            field.axis[MAX_RANK - rank + i] = strides[i + 1]


@functools.lru_cache(maxsize=256)
def _window_table(axis: Axis) -> Tensor:
    """`[2, length]`: of each token the first key that it sees, as a position in its dilation group, and how many."""
    windows = [
        axis.window_at(token // axis.dilation, axis.group_length(token % axis.dilation)) for token in range(axis.length)
    ]
    table = torch.tensor([(start, end - start) for start, end in windows], dtype=torch.int32, device="cpu")
    return table.T.contiguous()


def _chunk(problem: Problem, threads: int) -> int:
    """Queries of a task along the first axis, positions of a dilation group."""
    first, *rest = problem.axes
    longest = first.group_length(0)
    row = math.prod(axis.group_length(0) for axis in rest) * 4 * (problem.head_dim + problem.value_dim)
    tasks = problem.batch * problem.key_heads * math.prod(problem.dilation)
    wanted = -(-TASKS_PER_THREAD * threads // tasks)
    fitting = CACHE_BYTES // row - first.window + 1
    # A chunk also reads the keys around it: it should not be much shorter than the window.
    return min(longest, max(min(-(-longest // wanted), fitting), first.window))


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, threads: int, chunked: bool) -> Arguments:
    """All of the arguments but the tensors."""
    plan = Arguments(
        batch=problem.batch,
        heads=problem.heads,
        key_heads=problem.key_heads,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        additional=problem.additional,
        scale=problem.scale,
        bias_size=math.prod(problem.rpb_shape[1:]),
    )
    axes = (Axis(1, 1),) * (MAX_RANK - problem.rank) + problem.axes
    first = MAX_RANK - problem.rank
    for i, axis in enumerate(axes):
        table = _window_table(axis)
        chunk = _chunk(problem, threads) if chunked and i == first else axis.group_length(0)
        start, count = (row.data_ptr() for row in table)
        plan.axis[i] = _Axis(axis.length, axis.window, axis.dilation, chunk, start, count)
        plan.tables = (*getattr(plan, "tables", ()), table)  # which must live as long as the plan
    keys = problem.window_size + problem.additional
    work = problem.batch * problem.heads * problem.tokens * keys * (problem.head_dim + problem.value_dim)
    plan.threads = max(1, min(threads, work // WORK_PER_THREAD))
    return plan


def _arguments(problem: Problem, operands: Operands, chunked: bool) -> tuple[Arguments, list[Tensor]]:
    """Arguments with the operands in, and tensors that must live as long as they are used."""
    plan = _plan(problem, torch.get_num_threads(), chunked)
    call = Arguments.from_buffer_copy(plan)
    call.plan = plan  # whose tables the copy points to
    tensors = [operands.query.float(), operands.key.float(), operands.value.float()]
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        call.tensor(name, tensor, problem.rank)
    if operands.additional_keys is not None and operands.additional_values is not None:
        extras = operands.additional_keys.float(), operands.additional_values.float()
        for field, extra in zip((call.additional_key, call.additional_value), extras, strict=True):
            field.data, field.batch, field.axis[MAX_RANK - 1], field.head, _ = extra.data_ptr(), *extra.stride()
        tensors += extras
    if operands.rpb is not None:
        bias = operands.rpb.new_zeros(operands.rpb.numel() + 2 * PADDING, dtype=torch.float32)
        torch.mul(operands.rpb.flatten().float(), LOG2_E, out=bias[PADDING:-PADDING])
        call.bias = bias[PADDING:].data_ptr()
        tensors.append(bias)
    return call, tensors


def _run(name: str, call: Arguments) -> None:
    if getattr(build.library(), name)(ctypes.byref(call)):
        raise MemoryError("neighborhood attention on the CPU: no memory for a task's keys and values")


class Native:
    """Loops compiled for this processor."""

    name = "native"

    def why_not(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"It runs on a CPU; the tensors are on {problem.device}."
        if problem.dtype == torch.float64:
            return "It computes in float32; the tensors are float64."
        return build.why_not_here()

    def forward(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
        output, lse = self._forward(problem, operands)
        return output.to(problem.dtype), lse

    def _forward(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
        """The results, both in float32."""
        call, tensors = _arguments(problem, operands, chunked=True)
        shape = (problem.batch, *problem.space, problem.heads)
        output = tensors[0].new_empty((*shape, problem.value_dim))
        lse = tensors[0].new_empty(shape)
        call.tensor("output", output, problem.rank)
        call.tensor("lse", lse, problem.rank)
        _run("fastna_forward", call)
        return output, lse

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        grad_lse: Tensor | None,
        needs_rpb_grad: bool,
    ) -> Gradients:
        if problem.dtype != torch.float32:
            # From an output rounded to 16 bits, delta may be off by more than ds is large.
            output, lse = self._forward(problem, operands)
        call, tensors = _arguments(problem, operands, chunked=False)
        query, key, value = tensors[:3]
        given = {"output": output, "lse": lse, "grad_output": grad_output.float()}
        if grad_lse is not None:
            given["grad_lse"] = grad_lse
        named = {"query": query, "key": key, "value": value}
        grads = {f"grad_{name}": tensor.new_empty(tensor.shape) for name, tensor in named.items()}
        for name, tensor in (given | grads).items():
            call.tensor(name, tensor, problem.rank)
        tasks = problem.batch * problem.key_heads * math.prod(problem.dilation)
        sums = _Sums(problem, tasks, needs_rpb_grad)
        sums.put_into(call)
        _run("fastna_backward", call)
        rpb, additional_keys, additional_values = sums.totals()
        return Gradients(
            query=grads["grad_query"].to(problem.dtype),
            key=grads["grad_key"].to(problem.dtype),
            value=grads["grad_value"].to(problem.dtype),
            rpb=rpb,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )


class _Sums:
    """Gradients that every task adds to: a part for each, summed in a fixed order."""

    def __init__(self, problem: Problem, tasks: int, needs_rpb_grad: bool) -> None:
        self.problem = problem
        self.bias = self.keys = self.values = None
        if needs_rpb_grad:
            size = problem.heads // problem.key_heads * math.prod(problem.rpb_shape[1:])
            self.bias = torch.zeros(tasks, size + 2 * PADDING, **FLOATS)
        if problem.additional:
            self.keys = torch.empty(tasks, problem.additional, problem.head_dim, **FLOATS)
            self.values = torch.empty(tasks, problem.additional, problem.value_dim, **FLOATS)

    def put_into(self, call: Arguments) -> None:
        if self.bias is not None:
            call.grad_bias = self.bias.data_ptr()
        if self.keys is not None and self.values is not None:
            call.grad_additional_key, call.grad_additional_value = self.keys.data_ptr(), self.values.data_ptr()

    def totals(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of rpb, additional keys and additional values. Tasks are numbered [batch, key_heads, group]."""
        problem = self.problem
        numbers = (problem.batch, problem.key_heads, -1)

        def additional(parts: Tensor | None) -> Tensor | None:
            if parts is None:
                return None
            return parts.view(*numbers, *parts.shape[1:]).sum(2).transpose(1, 2).contiguous().to(problem.dtype)

        rpb = None
        if self.bias is not None:
            parts = self.bias[:, PADDING:-PADDING].unflatten(0, numbers)
            rpb = parts.sum((0, 2)).view(problem.rpb_shape).to(problem.rpb_dtype)
        return rpb, additional(self.keys), additional(self.values)


BACKEND = Native()
