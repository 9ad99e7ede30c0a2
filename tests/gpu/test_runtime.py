"""Loading and launching: errors are exceptions, streams and devices are PyTorch's, and a launch costs little."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from probes import PROBE, include_probes, probe_source, run_probe

from kernels.cuda import runtime
from kernels.cuda.jit import KernelSource
from kernels.errors import KernelError, LaunchError, SharedMemoryError


@pytest.fixture(autouse=True)
def _probes(monkeypatch):
    include_probes(monkeypatch)


def vector_kernel(device: torch.device) -> runtime.Kernel:
    return runtime.kernel(probe_source("vector_probe"), device)


def test_a_kernel_is_loaded_once_and_knows_its_registers(cuda):
    kernel = vector_kernel(cuda)
    assert kernel is vector_kernel(cuda)
    assert 0 < kernel.attributes.registers <= 255
    assert kernel.attributes.local_bytes == 0


def test_more_shared_memory_than_the_device_has_is_refused(cuda):
    limit = runtime.properties(cuda).shared_memory
    assert limit > runtime.STATIC_SHARED_LIMIT
    out = torch.zeros(1, dtype=torch.int32, device=cuda)
    run_probe("poison_probe", out, shared=limit)  # all of it is granted
    with pytest.raises(SharedMemoryError, match=f"wants {limit + 1} bytes .* has {limit}"):
        run_probe("poison_probe", out, shared=limit + 1)
    torch.cuda.synchronize()


def test_a_refused_launch_is_an_exception_and_leaves_the_device_usable(cuda):
    source = probe_source("vector_probe")
    values = torch.arange(128, dtype=torch.int32, device=cuda)
    too_many = KernelSource(source.header, source.function, source.config, source.arguments, threads=1024)
    kernel = runtime.kernel(too_many, cuda)
    with pytest.raises(LaunchError, match=r"vector_probe on cuda:\d.*grid 4294967296"):
        kernel.launch(2**32, 0, PROBE.pack(count=0))
    assert torch.equal(run_probe("vector_probe", torch.empty_like(values), values), values)


def test_launches_go_to_the_current_stream(cuda):
    """A side stream sleeps, then fills the source: a launch elsewhere would copy what was there before."""
    before = torch.zeros(128, dtype=torch.int32, device=cuda)
    side = torch.cuda.Stream(cuda)
    side.wait_stream(torch.cuda.current_stream(cuda))
    vector_kernel(cuda)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        before.fill_(7)
        out = run_probe("vector_probe", torch.empty_like(before), before)
    side.synchronize()
    assert (out == 7).all()


def test_a_thread_may_begin_with_a_launch(cuda):
    """As one of autograd does whose first kernel is ours: nothing has made the device's context current there."""
    values = torch.arange(128, dtype=torch.int32, device=cuda)
    out = torch.zeros_like(values)
    kernel, stream = vector_kernel(cuda), torch.cuda.current_stream(cuda).cuda_stream
    arguments = PROBE.pack(a=values.data_ptr(), out=out.data_ptr(), count=0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(kernel.launch, 1, 0, arguments, stream).result()
    assert torch.equal(out, values)


def test_a_stream_can_be_named(cuda):
    values = torch.arange(128, dtype=torch.int32, device=cuda)
    out = torch.zeros_like(values)
    side = torch.cuda.Stream(cuda)
    torch.cuda.synchronize()
    arguments = PROBE.pack(a=values.data_ptr(), out=out.data_ptr(), count=0)
    vector_kernel(cuda).launch(1, 0, arguments, stream=side.cuda_stream)
    side.synchronize()
    assert torch.equal(out, values)


def test_nothing_is_loaded_during_a_capture(cuda):
    source = probe_source("vector_probe")
    fresh = KernelSource(source.header, source.function, source.config, source.arguments, threads=64)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(KernelError, match="make the call once before capturing"), torch.cuda.graph(graph):
        runtime.kernel(fresh, cuda)
    torch.cuda.synchronize()
    assert runtime.kernel(fresh, cuda).attributes.registers > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_kernel_runs_on_the_device_of_its_tensors():
    other = torch.device("cuda", 1)
    values = torch.arange(128, dtype=torch.int32, device=other)
    assert torch.cuda.current_device() == 0
    assert torch.equal(run_probe("vector_probe", torch.empty_like(values), values), values)
    assert torch.cuda.current_device() == 0


@pytest.mark.alone
def test_a_launch_costs_a_few_microseconds_of_host_time(cuda):
    kernel = vector_kernel(cuda)
    values = torch.arange(128, dtype=torch.int32, device=cuda)
    arguments = PROBE.pack(a=values.data_ptr(), out=torch.empty_like(values).data_ptr(), count=0)
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            kernel.launch(1, 0, arguments)
        best = min(best, (time.perf_counter() - began) / 100)
    print(f"host time of a launch: {best * 1e6:.2f} us")
    assert best < 20e-6
