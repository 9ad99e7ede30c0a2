"""The Hopper kernels' sources, run on the CPU: tensor copies, memory barriers and wgmma come from hopper_engine.h."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulator import EmulatorRuntime, guarded
from test_flash import TOLERANCE, close, make_operands, make_problem
from torch import Tensor

from kernels import backend, explain, neighborhood_attention, set_deterministic
from kernels.backend import Gradients, Operands
from kernels.cuda import hopper, hopper_backward, hopper_joint, hopper_tiles
from kernels.cuda.hopper_tiles import Tiles
from kernels.cuda.runtime import use_runtime
from kernels.problem import Axis, Problem
from kernels.reference import Reference


@pytest.fixture(autouse=True)
def _any_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_tiles, "SMALLEST_WINDOW", 1)
    monkeypatch.setattr(hopper, "SMALL_WINDOW", 0)


def use_tiles(monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    """Instead of those of the fewest pairs, forward and backward."""
    monkeypatch.setattr(hopper_tiles, "choose_tiles", lambda *_: tiles)


def doubles(operands: Operands) -> Operands:
    return Operands(*(None if t is None else t.double() for t in dataclasses.astuple(operands)))


def in_doubles(problem: Problem) -> Problem:
    return dataclasses.replace(problem, dtype=torch.float64, rpb_dtype=problem.rpb_dtype and torch.float64)


def check_forward(problem: Problem, *, packed: bool = False) -> tuple[Tensor, Tensor]:
    operands = make_operands(problem, packed=packed)
    assert hopper.why_not(problem) is None
    assert hopper.why_not_operands(problem, operands) is None
    expected, expected_lse = Reference().forward(in_doubles(problem), doubles(operands))
    output, lse = backend.forward(hopper, problem, operands)
    close("output", output, expected, TOLERANCE[problem.dtype])
    close("lse", lse, expected_lse, TOLERANCE[problem.dtype])
    return output, lse


def check_backward(
    problem: Problem, *, packed: bool = False, needs_rpb_grad: bool = False, family: ModuleType = hopper_backward
) -> Gradients:
    """All gradients, that through lse included."""
    operands = make_operands(problem, packed=packed)
    assert family.why_not(problem) is None
    exact, exact_operands = in_doubles(problem), doubles(operands)
    output, lse = Reference().forward(exact, exact_operands)
    grad_output = guarded(torch.randn(output.shape).to(problem.dtype))
    grad_lse = guarded(torch.randn(lse.shape))
    assert family.why_not_gradient(operands, grad_output) is None
    wanted = Reference().backward(
        exact, exact_operands, output, lse, grad_output.double(), grad_lse.double(), needs_rpb_grad
    )
    rounded = guarded(output.to(problem.dtype)), guarded(lse.float())
    gradients = backend.backward(family, problem, operands, *rounded, grad_output, grad_lse, needs_rpb_grad)
    names = ["query", "key", "value", *(["rpb"] if needs_rpb_grad else [])]
    for name in names + (["additional_keys", "additional_values"] if problem.additional else []):
        close(f"gradient of {name}", getattr(gradients, name), getattr(wanted, name), 2 * TOLERANCE[problem.dtype])
    return gradients


WINDOWS = [
    (Axis(300, 140),),
    (Axis(333, 60, 2),),  # groups of different lengths
    (Axis(290, 130, causal=True),),
    (Axis(280, 96, stride=32),),
    (Axis(64, 64),),
    (Axis(20, 12), Axis(24, 13)),
    (Axis(33, 8, 3), Axis(26, 9, 2)),
    (Axis(18, 10, causal=True), Axis(21, 8, stride=5)),
    (Axis(21, 6, 2, 3, True), Axis(17, 17)),
    (Axis(6, 5), Axis(10, 6), Axis(13, 7)),
    (Axis(9, 3, 2, causal=True), Axis(8, 6, stride=4), Axis(19, 5, 3)),
]


@pytest.mark.parametrize("axes", WINDOWS, ids=str)
def test_every_kind_of_window(emulator: EmulatorRuntime, axes: tuple[Axis, ...]) -> None:
    problem = make_problem(*axes, head_dim=64)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 96, 128, 192, 256])
def test_head_dims(emulator: EmulatorRuntime, head_dim: int) -> None:
    dtype = torch.bfloat16 if head_dim % 64 else torch.float16
    problem = make_problem(Axis(14, 9), Axis(19, 11), head_dim=head_dim, dtype=dtype)
    check_forward(problem)
    check_backward(problem)


def test_batches_and_shared_heads(emulator: EmulatorRuntime) -> None:
    problem = make_problem(Axis(13, 7), Axis(20, 12), batch=2, heads=4, key_heads=2, head_dim=32, dtype=torch.bfloat16)
    check_forward(problem)
    check_backward(problem)


def test_packed_qkv_is_read_in_place(emulator: EmulatorRuntime) -> None:
    problem = make_problem(Axis(13, 7), Axis(20, 12), batch=2, heads=3, head_dim=64)
    check_forward(problem, packed=True)
    check_backward(problem, packed=True)


@pytest.mark.parametrize(
    ("axes", "rpb_dtype"),
    [
        ((Axis(300, 140),), torch.float16),
        ((Axis(33, 8, 3), Axis(26, 9, 2)), torch.bfloat16),
        ((Axis(18, 10, causal=True), Axis(21, 8, stride=5)), torch.float32),
    ],
    ids=str,
)
def test_bias(emulator: EmulatorRuntime, axes: tuple[Axis, ...], rpb_dtype: torch.dtype) -> None:
    """Every head has its own, heads that share keys too."""
    dtype = torch.float16 if rpb_dtype == torch.float32 else rpb_dtype
    problem = make_problem(*axes, heads=2, key_heads=1, head_dim=32, dtype=dtype, rpb_dtype=rpb_dtype)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize(
    ("axes", "additional", "rpb_dtype"),
    [
        ((Axis(300, 140),), 1, None),
        ((Axis(14, 9), Axis(19, 11)), 150, None),  # more than a box
        ((Axis(6, 5), Axis(12, 5, 2), Axis(13, 7)), 20, torch.float32),
    ],
    ids=str,
)
def test_additional_keys(
    emulator: EmulatorRuntime, axes: tuple[Axis, ...], additional: int, rpb_dtype: torch.dtype | None
) -> None:
    problem = make_problem(
        *axes, batch=2, heads=2, key_heads=1, head_dim=64, additional=additional, rpb_dtype=rpb_dtype
    )
    check_forward(problem)
    check_backward(problem)
    if rpb_dtype is not None:
        check_backward(problem, needs_rpb_grad=True)
    assert "additional keys" in str(hopper_joint.why_not(problem))


def test_bias_at_a_large_head_dim(emulator: EmulatorRuntime) -> None:
    problem = make_problem(Axis(14, 9), Axis(19, 11), heads=2, head_dim=192, rpb_dtype=torch.float16)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("rows", [(1, 1, 64), (1, 16, 4), (4, 16, 1)], ids=str)
def test_bias_of_rows_in_any_box(
    emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int, int]
) -> None:
    """Where the row eight further lies: on the same line, another one, another plane."""
    use_tiles(monkeypatch, Tiles(rows, (1, 1, 2), (2, 2, 8), 2))
    problem = make_problem(Axis(4, 3), Axis(17, 5), Axis(20, 6), head_dim=16, rpb_dtype=torch.float32)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("family", [hopper_backward, hopper_joint], ids=lambda family: family.__name__)
def test_the_gradient_of_a_bias(emulator: EmulatorRuntime, family: ModuleType) -> None:
    problem = make_problem(Axis(20, 12), Axis(24, 13), heads=2, head_dim=32, rpb_dtype=torch.float32)
    check_backward(problem, needs_rpb_grad=True, family=family)


def test_a_bias_that_shared_memory_does_not_hold(emulator: EmulatorRuntime) -> None:
    axes = Axis(30, 18), Axis(48, 24), Axis(80, 24)
    assert hopper.why_not(make_problem(*axes, head_dim=128)) is None
    problem = make_problem(*axes, head_dim=128, rpb_dtype=torch.float32)
    for family in (hopper, hopper_backward, hopper_joint):
        assert "a bias of (35, 47, 47)" in str(family.why_not(problem))
    problem = make_problem(Axis(128, 48), Axis(128, 48), head_dim=128, rpb_dtype=torch.float32)
    assert hopper_backward.why_not(problem) is None
    assert "a bias of (95, 95)" in str(hopper_joint.why_not(problem))


def test_dilations_that_leave_small_boxes(emulator: EmulatorRuntime) -> None:
    """A copy spans at most 256 tokens, so at a dilation of 4 it brings 64, and of 5 not even a warpgroup's rows."""
    problem = make_problem(Axis(290, 70, 4), head_dim=16)
    check_forward(problem)
    check_backward(problem)
    for family in (hopper, hopper_backward, hopper_joint):
        assert "at a dilation of (5,)" in str(family.why_not(make_problem(Axis(600, 70, 5), head_dim=64)))


@pytest.mark.parametrize(
    ("axes", "head_dim"),
    [
        ((Axis(300, 140),), 128),
        ((Axis(33, 8, 3), Axis(26, 9, 2)), 64),
        ((Axis(9, 3, 2, causal=True), Axis(8, 6, stride=4), Axis(19, 5, 3)), 32),
    ],
    ids=str,
)
def test_joint_gradients(emulator: EmulatorRuntime, axes: tuple[Axis, ...], head_dim: int) -> None:
    check_backward(make_problem(*axes, head_dim=head_dim), family=hopper_joint)


def test_joint_gradients_of_batches_and_shared_heads(emulator: EmulatorRuntime) -> None:
    problem = make_problem(Axis(13, 7), Axis(20, 12), batch=2, heads=4, key_heads=2, head_dim=32, dtype=torch.bfloat16)
    check_backward(problem, family=hopper_joint)
    problem = make_problem(Axis(13, 7), Axis(20, 12), batch=2, heads=3, head_dim=64)
    check_backward(problem, packed=True, family=hopper_joint)


@pytest.mark.parametrize(
    ("axes", "head_dim", "rpb_dtype"),
    [
        ((Axis(300, 140),), 128, torch.float16),
        ((Axis(18, 10, causal=True), Axis(21, 8, stride=5)), 64, torch.float32),
        ((Axis(6, 5), Axis(12, 5, 2), Axis(13, 7)), 32, torch.float32),
    ],
    ids=str,
)
def test_joint_gradients_with_a_bias(
    emulator: EmulatorRuntime, axes: tuple[Axis, ...], head_dim: int, rpb_dtype: torch.dtype
) -> None:
    problem = make_problem(*axes, heads=2, key_heads=1, head_dim=head_dim, rpb_dtype=rpb_dtype)
    check_backward(problem, family=hopper_joint)


def test_joint_gradients_where_a_warpgroup_skips_boxes(emulator: EmulatorRuntime) -> None:
    check_backward(make_problem(Axis(420, 40), head_dim=128), family=hopper_joint)


def check_scores_far_below_zero(family: ModuleType, additional: int = 0) -> None:
    """What is no key must be left alone: its weight would be 2^-lse, infinite, times a key of zeros."""
    problem = make_problem(Axis(20, 20), Axis(20, 20), head_dim=64, scale=1.0, additional=additional)
    operands = make_operands(problem)
    operands.query.fill_(-4)
    for keys in (operands.key, operands.additional_keys):
        if keys is not None:
            keys.fill_(4)  # scores of -1024
    output, lse = Reference().forward(in_doubles(problem), doubles(operands))
    output, lse = guarded(output.half()), guarded(lse.float())
    grad_output = guarded(torch.randn(output.shape).half())
    gradients = backend.backward(family, problem, operands, output, lse, grad_output, None, needs_rpb_grad=False)
    assert gradients.query.isfinite().all()


def test_scores_far_below_zero(emulator: EmulatorRuntime) -> None:
    check_scores_far_below_zero(hopper_joint)
    check_scores_far_below_zero(hopper_backward, additional=20)


@pytest.fixture
def nondeterminism() -> Iterator[None]:
    set_deterministic(False)
    yield
    set_deterministic(True)
    torch.use_deterministic_algorithms(False)


def test_joint_gradients_where_they_are_allowed(emulator: EmulatorRuntime, nondeterminism: None) -> None:
    operands = [torch.randn(1, 300, 2, 32).half().requires_grad_() for _ in range(3)]

    def kernels_used() -> set[str]:
        before = set(emulator.kernels)
        neighborhood_attention(*operands, 140, backend="fused").sum(-1, keepdim=True).square().sum().backward()
        return {source.function for source in set(emulator.kernels) - before}

    def says() -> str:
        return str(explain(*operands, 140, backend="fused"))

    assert "hopper_joint" in kernels_used() - {"hopper_gradient"}
    assert "set_deterministic" in says()
    torch.use_deterministic_algorithms(True)
    used = kernels_used()
    assert "hopper_gradient" in used
    assert "hopper_joint" not in used
    assert "set_deterministic" not in says()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("additional", "rpb"), [(20, False), (0, True)], ids=["additional", "bias"])
@pytest.mark.usefixtures("nondeterminism")
def test_later_calls_write_new_addresses_into_the_same_maps(
    emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, deterministic: bool, additional: int, rpb: bool
) -> None:
    """Through the public operator. Whatever depends on no address is worked out once."""
    set_deterministic(deterministic)
    worked_out = []
    encoder = emulator.tensor_map_encoder
    monkeypatch.setattr(emulator, "tensor_map_encoder", lambda *layout: worked_out.append(layout) or encoder(*layout))
    problem = make_problem(Axis(300, 140), heads=2, head_dim=32, additional=additional)
    calls = [[torch.randn_like(t) for t in make_operands(problem).tensors if t is not None] for _ in range(3)]

    def compute(tensors: list[Tensor], bias: Tensor | None, incoming: Tensor, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in tensors]
        extra = dict(zip(("additional_keys", "additional_values"), leaves[3:], strict=False))
        output = neighborhood_attention(*leaves[:3], 140, rpb=bias, backend=backend, **extra)
        return output.detach(), *torch.autograd.grad(output, leaves, incoming)

    for tensors in calls:
        bias, incoming = torch.randn(2, 279) if rpb else None, torch.randn_like(tensors[0])
        exact = [t.double() for t in tensors], None if bias is None else bias.double(), incoming.double()
        results = zip(compute(tensors, bias, incoming, "fused"), compute(*exact, "reference"), strict=True)
        for actual, wanted in results:
            close("output or gradient", actual, wanted, 2 * TOLERANCE[torch.float16])
        if tensors is calls[0]:
            first = len(worked_out)
    assert len(worked_out) == first > 0
    used = {source.function for source in emulator.kernels}
    assert {"hopper_forward", "hopper_gradient" if deterministic or additional else "hopper_joint"} <= used


def test_small_windows_have_a_block_per_warpgroup(emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "SMALL_WINDOW", 256)
    for rpb_dtype in (None, torch.float32):
        check_forward(make_problem(Axis(20, 13), Axis(24, 13), head_dim=64, rpb_dtype=rpb_dtype))
    assert {source.min_blocks for source in emulator.kernels} == {3}


SKIPPING = (Axis(420, 40),)
"""With boxes of 16 keys, the second of two warpgroups has no use for four boxes at the start; there are two stages."""


@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_boxes_that_a_warpgroup_skips(
    emulator: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, warpgroups: int, stages: int
) -> None:
    use_tiles(monkeypatch, Tiles((1, 1, 64), (1, 1, warpgroups), (1, 1, 16), stages))
    check_forward(make_problem(*SKIPPING, head_dim=16, additional=20 if stages == 2 else 0))
    if stages > 1:  # a box is held until the next one's scores are computed
        check_backward(make_problem(*SKIPPING, head_dim=16))


@pytest.mark.parametrize("seed", range(2, 8))
def test_any_order_of_events(seed: int) -> None:
    with use_runtime("cpu", EmulatorRuntime(seed)):
        problem = make_problem(Axis(20, 12), Axis(24, 13), head_dim=64)
        check_forward(problem)
        check_backward(problem)


def test_the_same_bits_in_any_order(emulator: EmulatorRuntime) -> None:
    problem = make_problem(Axis(20, 12), Axis(24, 13), heads=2, key_heads=1, head_dim=32)
    (first, first_gradients), (second, second_gradients) = (
        (check_forward(problem), check_backward(problem)) for _ in range(2)
    )
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first_gradients, name), getattr(second_gradients, name))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("expanded", [False, True])
def test_the_fused_backend_takes_it(emulator: EmulatorRuntime, expanded: bool) -> None:
    """Through the public operator. A gradient that tensor copies cannot read goes to the next family."""
    torch.manual_seed(0)
    operands = [torch.randn(1, 300, 2, 32).half().requires_grad_() for _ in range(3)]
    output = neighborhood_attention(*operands, 140, backend="fused")
    grad_output = torch.randn(1, 1, 1, 32).half().expand(output.shape) if expanded else torch.randn(output.shape).half()
    gradients = torch.autograd.grad(output, operands, grad_output)
    used = {source.function for source in emulator.kernels}
    assert "hopper_forward" in used
    assert ("hopper_gradient" in used) is not expanded
    exact = [t.detach().double().requires_grad_() for t in operands]
    expected = neighborhood_attention(*exact, 140, backend="reference")
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, exact, grad_output.double()), strict=True):
        close("gradient", actual, wanted, 2 * TOLERANCE[torch.float16])
