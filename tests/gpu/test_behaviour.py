"""What holds besides the numbers: determinism, CUDA graphs, streams, strides, devices, running out of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import explain, na1d, na2d, na3d, neighborhood_attention, set_deterministic

BACKENDS = ("naive", "gemm", "fused")
HALF = (torch.float16, torch.bfloat16)


def projection(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Query, key and value `shape`, as slices of one packed projection `[batch, *space, 3, heads, head_dim]`."""
    generator = torch.Generator(device).manual_seed(seed)
    packed = torch.randn(*shape[:-2], 3, *shape[-2:], device=device, generator=generator).to(dtype)
    return packed.unbind(-3)


def bias(device: torch.device, dtype: torch.dtype, heads: int, *window: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(heads, *(2 * k - 1 for k in window), device=device, generator=generator).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_the_best_backend_on_cuda_is_fused(cuda):
    for dtype in (*HALF, torch.float32):
        query, key, value = projection(cuda, dtype, 1, 14, 14, 2, 32)
        assert explain(query, key, value, 7).backend == "fused"


@pytest.mark.parametrize(
    ("space", "window", "dilation"),
    [
        ((56, 56), (7, 7), 1),
        ((40, 44), (13, 15), 1),
        ((28, 28), (7, 7), 4),
        ((30, 31), (9, 8), 1),
        ((12, 13), (5, 5), 2),
    ],
)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_gives_the_same_bits(cuda, backend, dtype, space, window, dilation):
    """Forward and backward, over memory that differs in between."""
    query, key, value = (t.requires_grad_() for t in projection(cuda, dtype, 3, *space, 2, 32))
    rpb = bias(cuda, dtype, 2, *window).requires_grad_()
    runs = []
    for _ in range(2):
        output, lse = na2d(query, key, value, window, dilation=dilation, rpb=rpb, return_lse=True, backend=backend)
        runs.append([output, lse, *torch.autograd.grad(output.square().sum(), (query, key, value, rpb))])
        torch.empty(1 << 24, device=cuda).fill_(float("nan"))
    names = ("output", "lse", "grad_query", "grad_key", "grad_value", "grad_rpb")
    for name, first, second in zip(names, *runs, strict=True):
        assert torch.equal(first, second), name
        assert first.isfinite().all(), name


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_that_may_differ_in_their_last_bits(cuda, head_dim, dilation, has_bias):
    """Of large windows on Hopper; elsewhere they are the same ones."""
    query, key, value = (t.requires_grad_() for t in projection(cuda, torch.bfloat16, 2, 70, 75, 2, head_dim))
    rpb = bias(cuda, torch.float32, 2, 15, 15) if has_bias else None

    def gradients() -> tuple[Tensor, ...]:
        output = na2d(query, key, value, 15, dilation=dilation, rpb=rpb)
        return torch.autograd.grad(output.square().sum(), (query, key, value))

    expected = gradients()
    set_deterministic(False)
    try:
        actual = gradients()
    finally:
        set_deterministic(True)
    for name, one, other in zip(("query", "key", "value"), actual, expected, strict=True):
        assert relative(one, other) < 1e-2, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_projection_is_read_in_place(cuda, backend):
    query, key, value = projection(cuda, torch.float16, 4, 56, 56, 4, 32)
    na2d(query, key, value, 7, backend=backend)  # compiled, loaded
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, lse = na2d(query, key, value, 7, return_lse=True, backend=backend)
    used = torch.cuda.max_memory_allocated() - before
    results = output.nbytes + lse.nbytes
    weights = 0 if backend == "fused" else 2 * lse.numel() * 64 * 2  # window 49 in 16 bits, with room to pad
    assert used <= 1.1 * (results + weights)
    assert torch.equal(output, na2d(query.contiguous(), key.contiguous(), value.contiguous(), 7, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cuda_graph_replays_forward_and_backward(cuda, backend, dtype):
    query, key, value = (t.clone().requires_grad_() for t in projection(cuda, dtype, 2, 28, 28, 2, 32))
    rpb = bias(cuda, dtype, 2, 7, 7).requires_grad_()
    operands = (query, key, value, rpb)

    def step() -> tuple[Tensor, ...]:
        output = na2d(query, key, value, 7, rpb=rpb, backend=backend)
        return output, *torch.autograd.grad(output.square().sum(), operands)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for operand, fresh in zip(operands[:3], projection(cuda, dtype, 2, 28, 28, 2, 32, seed=5), strict=True):
            operand.copy_(fresh)
    graph.replay()
    for replayed, direct in zip(captured, step(), strict=True):
        assert torch.equal(replayed, direct)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_compute_side_by_side(cuda, backend):
    problems = [projection(cuda, torch.float16, 4, 32, 32, 4, 32, seed=seed) for seed in range(2)]
    alone = [na2d(*problem, 7, backend=backend) for problem in problems]
    streams = [torch.cuda.Stream(cuda) for _ in problems]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    together: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, problem, results in zip(streams, problems, together, strict=True):
            with torch.cuda.stream(stream):
                results.append(na2d(*problem, 7, backend=backend))
    torch.cuda.synchronize()
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_another_device_than_the_current_one(backend):
    other = torch.device("cuda", 1)
    query, key, value = (t.requires_grad_() for t in projection(other, torch.float16, 2, 14, 14, 2, 32))
    assert torch.cuda.current_device() == 0
    output = na2d(query, key, value, 7, backend=backend)
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(t.device == other and t.isfinite().all() for t in (output, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_out_of_memory_leaves_the_process_usable(cuda, backend):
    query, key, value = projection(cuda, torch.float16, 2, 56, 56, 2, 32)
    expected = na2d(query, key, value, 7, backend=backend)
    free, total = torch.cuda.mem_get_info(cuda)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(cuda) + (64 << 20)) / total)
    try:
        batch = (free >> 10) // (56 * 56)  # an output of `free / 8` bytes, from inputs of no memory
        large = [t[:1].expand(batch, *t.shape[1:]) for t in (query, key, value)]
        with pytest.raises(torch.OutOfMemoryError):
            na2d(*large, 7, backend=backend)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(na2d(query, key, value, 7, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_are_those_of_finite_differences(cuda, backend, rank):
    """Along a random direction, in float32: (f(x + h) - f(x - h)) / 2 h against the gradient."""
    attend, space, window = ((na1d, (23,), 7), (na2d, (9, 11), (5, 4)), (na3d, (5, 6, 7), (3, 2, 5)))[rank - 1]
    windows = (window,) if isinstance(window, int) else window
    query, key, value = (t.clone() for t in projection(cuda, torch.float32, 2, *space, 2, 16))
    operands = [query, key, value, bias(cuda, torch.float32, 2, *windows)]
    generator = torch.Generator(cuda).manual_seed(2)
    weight = torch.randn(query.shape, device=cuda, generator=generator)
    direction = [torch.randn(t.shape, device=cuda, generator=generator) for t in operands]

    def loss(*tensors: Tensor) -> Tensor:
        *qkv, rpb = tensors
        return (attend(*qkv, window, rpb=rpb, backend=backend) * weight).double().sum()

    leaves = [t.requires_grad_() for t in operands]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for index, (gradient, step) in enumerate(zip(gradients, direction, strict=True)):
        h = 1e-2
        moved = [[t + sign * h * step if i == index else t for i, t in enumerate(operands)] for sign in (1, -1)]
        with torch.no_grad():
            numeric = (loss(*moved[0]) - loss(*moved[1])) / (2 * h)
        analytic = (gradient * step).double().sum()
        size = gradient.double().norm() * step.double().norm() / gradient.numel() ** 0.5
        assert abs(float(numeric - analytic)) <= 1e-2 * float(size) + 1e-2


@pytest.mark.alone
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(cuda, backend):
    """Tokens behind element 2^31: the last map of a large batch equals the same map alone, and so do its gradients."""
    batch, space, heads, head_dim = 22, (1024, 1024), 3, 32
    if torch.cuda.mem_get_info(cuda)[0] < 50 << 30:
        pytest.skip("needs 50 GiB of free GPU memory")
    shape = (batch, *space, heads, head_dim)
    assert torch.Size(shape).numel() > 2**31

    def large(last: Tensor) -> Tensor:
        tensor = torch.zeros(shape, dtype=torch.float16, device=cuda)
        tensor[-1:] = last
        return tensor

    last = [*projection(cuda, torch.float16, 1, *space, heads, head_dim)]
    last.append(torch.randn_like(last[0]))
    answers = []
    for *operands, gradient in ([large(tensor) for tensor in last], last):
        for operand in operands:
            operand.requires_grad_()
        output, lse = na2d(*operands, 3, return_lse=True, backend=backend)
        answers.append(
            [t[-1:].detach().clone() for t in (output, lse, *torch.autograd.grad(output, operands, gradient))]
        )
        del output, lse
    for name, one, other in zip(("output", "lse", "query", "key", "value"), *answers, strict=True):
        assert relative(one, other) < 2e-3, name  # a large batch may be cut otherwise, or be another kernel's


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_tf32_only_where_pytorch_allows_it(cuda, dtype):
    query, key, value = projection(cuda, dtype, 2, 20, 20, 2, 64)
    exact = na2d(query.double(), key.double(), value.double(), 7, backend="reference")
    tolerances = {torch.float32: (1e-5, 1e-3), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1e-2, 1e-2)}[dtype]
    for precision, tolerance in zip(("ieee", "tf32"), tolerances, strict=True):
        torch.backends.cuda.matmul.fp32_precision = precision
        assert relative(na2d(query, key, value, 7, backend="fused"), exact) <= tolerance


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("space", [(600,), (24, 25), (8, 9, 10)], ids=str)
def test_a_window_that_holds_the_whole_map(cuda, space, head_dim):
    """PyTorch's own attention forward, ours backward: one lse for both."""
    query, key, value = (t.requires_grad_() for t in projection(cuda, torch.bfloat16, 2, *space, 2, head_dim))
    results = []
    for convert in (torch.bfloat16, torch.float64):
        operands = [t.detach().to(convert, copy=True).requires_grad_() for t in (query, key, value)]
        backend = "reference" if convert is torch.float64 else "fused"
        output, lse = neighborhood_attention(*operands, space, return_lse=True, backend=backend)
        results.append([output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), operands)])
    for name, one, other in zip(("output", "lse", "query", "key", "value"), *results, strict=True):
        assert relative(one, other) < 1e-2, name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("length", "heads", "head_dim"), [(56, 2, 32), (28, 3, 32), (14, 8, 32), (14, 4, 64)])
def test_small_windows_of_many_maps(cuda, length, heads, head_dim, dtype):
    """As many as keep every SM busy: blocks that stay go from map to map. One map alone is another kernel's."""
    query, key, value = projection(cuda, dtype, 133, length, length, heads, head_dim)
    rpb = bias(cuda, torch.float32, heads, 7, 7)
    output, lse = na2d(query, key, value, 7, rpb=rpb, return_lse=True, backend="fused")
    again = na2d(query, key, value, 7, rpb=rpb, backend="fused")
    assert torch.equal(output, again)
    for batch in (0, 66, 132):
        one = slice(batch, batch + 1)
        alone, its_lse = na2d(query[one], key[one], value[one], 7, rpb=rpb, return_lse=True, backend="fused")
        assert relative(output[one], alone) < 4e-3, batch
        torch.testing.assert_close(lse[one], its_lse, atol=4e-3, rtol=0)
