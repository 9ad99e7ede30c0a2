"""What every primitive must do, on any device: run under the emulator in CI, and on a GPU where there is one.

Both passing is what makes the emulator's word on a kernel count.
"""

from __future__ import annotations

import itertools

import torch
from probes import run_probe, run_window_probe

from kernels.problem import Axis

AXES = [
    Axis(length, window, dilation, stride, causal)
    for length, window, dilation, causal in itertools.product((1, 7, 20, 33), (1, 2, 5, 7), (1, 3), (False, True))
    if window * dilation <= length
    for stride in sorted({1, 2, window})
    if stride <= window
]


def _numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(2048) / 2048 + 1  # every half and bf16 tie between 1 and 2
    special = torch.tensor(
        [0.0, -0.0, 65504, 65519.99, 65520, 65536, 3.4e38, 2**-24, 2**-25, 2**-25 * 1.01, 2**-14, 6e-8, 1e-40]
    )
    infinite = torch.tensor([torch.inf, -torch.inf, torch.nan])
    scales = torch.cat([ties * 2.0**e for e in (-26, -20, -15, 0, 8, 15)])
    return torch.cat([bits.view(torch.float32), scales, special, -special, infinite])


def check_rounding(device: torch.device, dtype: torch.dtype) -> None:
    numbers = _numbers().to(device)
    out = torch.empty(numbers.numel(), 3, device=device)
    config = {torch.float16: "half", torch.bfloat16: "bf16"}[dtype]
    run_probe("round_probe", out, numbers, config=config, count=numbers.numel(), grid=-(-numbers.numel() // 32))
    rounded = numbers.cpu().to(dtype).float()
    expected = torch.stack([rounded, rounded, -rounded], 1)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.cpu()[:, 0].signbit()[rounded == 0], expected[:, 0].signbit()[rounded == 0])


def check_functions(device: torch.device) -> None:
    numbers = torch.cat([torch.linspace(-140, 120, 999), torch.tensor([-torch.inf, torch.inf, 0.0, 1e-40])]).to(device)
    out = torch.empty(numbers.numel(), 5, device=device)
    run_probe("functions_probe", out, numbers, count=numbers.numel(), grid=-(-numbers.numel() // 32))
    x, exponential, logarithm, reciprocal, rounded, root = numbers.cpu(), *out.cpu().unbind(1)
    flush = torch.where(torch.exp2(x) < 2.0**-126, torch.zeros(()), torch.exp2(x))
    torch.testing.assert_close(exponential, flush, rtol=2e-7, atol=2.0**-125)
    normal = x.abs() >= 2.0**-126
    torch.testing.assert_close(logarithm[normal], torch.log2(x[normal]), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(reciprocal[normal], 1 / x[normal], rtol=2e-7, atol=0)
    torch.testing.assert_close(root[normal], torch.rsqrt(x[normal].double()).float(), rtol=2e-7, atol=0, equal_nan=True)
    assert logarithm[-2] == -torch.inf
    assert logarithm[-1] == -torch.inf  # a denormal counts as zero
    mantissa = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    nearest = ((mantissa + 0x1000) & ~0x1FFF).to(torch.int64)
    finite = x.isfinite() & normal
    assert torch.equal(rounded.view(torch.int32).to(torch.int64)[finite] & 0xFFFFFFFF, nearest[finite])


def check_warp(device: torch.device) -> None:
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    values[1] = values[1].abs()
    values[2] = -values[2].abs()
    out = torch.empty(4, 32, 8, device=device)
    run_probe("warp_probe", out, values.to(device), threads=64, grid=2)
    lanes = torch.arange(32)
    positive = values > 0
    expected = [
        values.flip(1),
        values[:, lanes ^ 5],
        positive.any(1, keepdim=True).expand(4, 32).float(),
        positive.all(1, keepdim=True).expand(4, 32).float(),
        torch.tensor([0.0, 1, 0, 1])[:, None].expand(4, 32),
        torch.tensor([0.0, 0, 1, 1])[:, None].expand(4, 32),
        torch.full((4, 32), 2.0),
        torch.tensor([3.0, 35, 3, 35])[:, None].expand(4, 32),
    ]
    assert torch.equal(out.cpu(), torch.stack(expected, 2))


def check_matrices(device: torch.device) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.empty(32, 13, dtype=torch.int32, device=device)
    run_probe("matrix_probe", out, matrices.to(device), shared=512)
    rows = matrices.reshape(4, 32, 2)  # of lane 4 g + q: elements 2 q, 2 q + 1 of row g
    columns = matrices.transpose(1, 2).reshape(4, 32, 2)
    expected = torch.cat([rows, columns, rows[:2], columns[:2], columns[:1]]).transpose(0, 1)
    assert torch.equal(out.cpu().view(torch.int16).view(32, 13, 2), expected)


def check_mma(device: torch.device, dtype: torch.dtype, half_depth: bool = False) -> None:
    generator = torch.Generator().manual_seed(2)
    depth = 8 if dtype == torch.float32 or half_depth else 16
    a, b = (torch.randn(rows, depth, generator=generator).to(dtype) for rows in (16, 8))
    out = torch.empty(16, 8, device=device)
    config = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bf16"}[dtype]
    run_probe("mma_probe", out, a.to(device), b.to(device), config=f"{config}, true" if half_depth else config)
    expected = 1 + a.double() @ b.double().T
    tolerance = 2e-3 if dtype == torch.float32 else 1e-5  # TF32 keeps 11 bits of each factor
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def check_copies(device: torch.device, size: int, chunks: int) -> None:
    words = size // 4
    source = torch.arange(1, chunks * words + 1, dtype=torch.int32).view(chunks, words)
    out = torch.full_like(source, -7).to(device)
    run_probe("copy_probe", out, source.to(device), config=str(size), count=chunks, threads=64, shared=2 * 64 * size)
    valid = (torch.arange(chunks) % 5 != 3)[:, None]
    assert torch.equal(out.cpu(), source * valid)


def check_barriers(device: torch.device) -> None:
    out = torch.empty(128, dtype=torch.int32, device=device)
    run_probe("barrier_probe", out, threads=128, shared=512)
    assert torch.equal(out.cpu(), torch.arange(128, dtype=torch.int32) ^ 32)


def check_vectors(device: torch.device) -> None:
    values = torch.arange(128, dtype=torch.int32, device=device)
    assert torch.equal(run_probe("vector_probe", torch.empty_like(values), values), values)


def check_windows(device: torch.device, axis: Axis) -> None:
    expected = []
    for token in range(axis.length):
        position, group = divmod(token, axis.dilation)
        length = axis.group_length(group)
        expected.append([*axis.window_at(position, length), *axis.queries_at(position, length), token])
    assert run_window_probe(axis, device).tolist() == expected
