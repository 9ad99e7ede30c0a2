"""Problems and checks that `naive` and `gemm` share: every option of the operator, on maps small enough to emulate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from emulator import guarded, guarded_allocations
from torch import Tensor

from kernels import backend, neighborhood_attention
from kernels.backend import Operands
from kernels.dispatch import choose
from kernels.problem import Problem
from kernels.validation import describe

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TF32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """One call: sizes, types and the operator's own arguments."""

    label: str
    space: tuple[int, ...]
    window: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    head_dim: int = 8
    value_dim: int = 8
    additional: int = 0
    rpb: bool = False
    packed: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.label


CASES = (
    Case("1d_even_window", (19,), (6,), batch=2, heads=2, key_heads=2, rpb=True, packed=True),
    Case(
        "1d_ragged_dilation_stride",
        (23,),
        (5,),
        torch.float16,
        heads=4,
        key_heads=2,
        value_dim=16,
        additional=3,
        arguments={"dilation": 3, "stride": 2},
    ),
    Case("1d_window_is_axis", (11,), (11,), torch.float16, arguments={"scale": 0.0}),
    Case("1d_long_window", (70,), (67,), torch.float16, rpb=True, arguments={"stride": 3, "is_causal": True}),
    Case(
        "2d_seven",
        (9, 7),
        (7, 7),
        torch.bfloat16,
        heads=2,
        key_heads=2,
        head_dim=32,
        value_dim=32,
        rpb=True,
        packed=True,
    ),
    Case(
        "2d_mixed_axes",
        (10, 9),
        (4, 3),
        torch.bfloat16,
        heads=2,
        head_dim=24,
        value_dim=40,
        additional=2,
        rpb=True,
        arguments={"dilation": (2, 3), "stride": (3, 1), "is_causal": (True, False)},
    ),
    Case("2d_wide_channels", (4, 5), (3, 3), head_dim=12, value_dim=20, additional=1, arguments={"dilation": (1, 1)}),
    Case(
        "3d_causal_time",
        (3, 5, 4),
        (2, 3, 3),
        heads=2,
        rpb=True,
        additional=1,
        arguments={"is_causal": (True, False, False), "stride": (1, 2, 1)},
    ),
    Case("3d_ragged_dilation", (5, 3, 7), (2, 3, 3), rpb=True, arguments={"dilation": (2, 1, 2)}),
)


@dataclass
class Tensors:
    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    grad_output: Tensor
    grad_lse: Tensor

    @property
    def operands(self) -> dict[str, Tensor]:
        names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}


def tensors_of(case: Case) -> Tensors:
    """Random operands beside guard pages, query, key and value slices of one tensor where the case is packed."""
    generator = torch.Generator().manual_seed(sum(case.label.encode()))

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return guarded(torch.randn(shape, generator=generator).to(dtype))

    lead = (case.batch, *case.space)
    if case.packed:
        query, key, value = normal(*lead, 3, case.heads, case.head_dim).unbind(-3)
    else:
        query = normal(*lead, case.heads, case.head_dim)
        key = normal(*lead, case.key_heads, case.head_dim)
        value = normal(*lead, case.key_heads, case.value_dim)
    rpb = keys = values = None
    if case.rpb:
        rpb = normal(case.heads, *(2 * size - 1 for size in case.window), dtype=torch.float32)
    if case.additional:
        keys = normal(case.batch, case.additional, case.key_heads, case.head_dim)
        values = normal(case.batch, case.additional, case.key_heads, case.value_dim)
    grad_lse = normal(*lead, case.heads, dtype=torch.float32)
    return Tensors(query, key, value, rpb, keys, values, normal(*lead, case.heads, case.value_dim), grad_lse)


def problem_of(case: Case, tensors: Tensors) -> Problem:
    rank = len(case.space)

    def per_axis(name: str, default: Any) -> tuple[Any, ...]:
        value = case.arguments.get(name, default)
        return value if isinstance(value, tuple) else (value,) * rank

    scale = case.arguments.get("scale", case.head_dim**-0.5)
    return describe(
        tensors.query,
        tensors.key,
        tensors.value,
        tensors.rpb,
        tensors.additional_keys,
        tensors.additional_values,
        case.window,
        per_axis("dilation", 1),
        per_axis("stride", 1),
        per_axis("is_causal", False),
        scale,
    )


def exact(case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """Output, lse and every gradient by the reference in float64."""
    operands = {name: tensor.double().requires_grad_() for name, tensor in tensors.operands.items()}
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    options = {name: tensor for name, tensor in operands.items() if name not in ("query", "key", "value")}
    output, lse = neighborhood_attention(
        query, key, value, case.window, backend="reference", return_lse=True, **options, **case.arguments
    )
    upstream = (tensors.grad_output.double(), tensors.grad_lse.double())
    gradients = torch.autograd.grad((output, lse), list(operands.values()), upstream)
    return _named(output, lse, dict(zip(operands, gradients, strict=True)))


def run(case: Case, tensors: Tensors, name: str) -> dict[str, Tensor]:
    """The same by a backend, which finds its memory beside guard pages and full of NaN."""
    problem = problem_of(case, tensors)
    chosen = choose(problem, name)
    operands = Operands(**tensors.operands)
    with guarded_allocations():
        output, lse = backend.forward(chosen, problem, operands)
        gradients = backend.backward(
            chosen, problem, operands, output, lse, tensors.grad_output, tensors.grad_lse, needs_rpb_grad=case.rpb
        )
    return _named(output, lse, {operand: getattr(gradients, operand) for operand in tensors.operands})


def _named(output: Tensor, lse: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"output": output, "lse": lse} | {f"grad_{name}": gradient for name, gradient in gradients.items()}


def assert_equals_reference(case: Case, backend: str, tolerance: float | None = None) -> None:
    """Every result within the tolerance of the type, relative to the reference's norm in float64."""
    tensors = tensors_of(case)
    expected, computed = exact(case, tensors), run(case, tensors, backend)
    limit = TOLERANCE[case.dtype] if tolerance is None else tolerance
    assert computed.keys() == expected.keys()
    for name, wanted in expected.items():
        operand = tensors.operands.get(name.removeprefix("grad_"))
        dtype = operand.dtype if operand is not None else torch.float32 if name == "lse" else case.dtype
        assert computed[name].dtype == dtype, name
        error, norm = torch.linalg.norm(computed[name].double() - wanted), torch.linalg.norm(wanted)
        assert error <= limit * norm.clamp_min(1e-3), f"{name}: error {error:.3g}, norm {norm:.3g}"


def assert_repeats(case: Case, backend: str) -> None:
    """The same bits from the same call."""
    tensors = tensors_of(case)
    first, second = run(case, tensors, backend), run(case, tensors, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def case_named(label: str) -> Case:
    return next(case for case in CASES if case.label == label)


every_case = pytest.mark.parametrize("case", CASES, ids=str)
