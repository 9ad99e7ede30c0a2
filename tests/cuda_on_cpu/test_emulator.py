"""The emulator notices what a GPU would leave undefined, and nothing else."""

from __future__ import annotations

import pytest
import torch
from emulator import EmulationError, EmulatorRuntime, guarded, guarded_allocations, guarded_empty
from probes import PROBE, probe_source, run_probe

from kernels.cuda import runtime
from kernels.cuda.jit import KernelSource
from kernels.cuda.runtime import use_runtime
from kernels.errors import CompilationError, LaunchError, SharedMemoryError

pytestmark = pytest.mark.usefixtures("emulator")
CPU = torch.device("cpu")


def floats(count: int) -> torch.Tensor:
    return torch.zeros(count)


@pytest.mark.parametrize(
    ("function", "launch", "message"),
    [
        ("divergent_probe", {}, "divergence"),
        ("partial_barrier_probe", {}, "barrier 0"),
        ("exited_lanes_probe", {}, "exit"),
        ("deadlock_probe", {"threads": 64}, r"deadlock: .*warp 0 waits at barrier 1; warp 1 waits at barrier 2"),
        (
            "shared_write_probe",
            {"shared": 100, "count": 100},
            "shared memory was written 100 bytes from its start; it has 100",
        ),
        (
            "shared_write_probe",
            {"shared": 4096, "count": 4096},
            "access 4096 bytes from the start of the 4096 bytes of shared",
        ),
        (
            "shared_write_probe",
            {"shared": 4096, "count": -1},
            "access -1 bytes from the start of the 4096 bytes of shared",
        ),
        ("shared_read_probe", {"shared": 8192, "count": 8200}, "access 8200 bytes"),
        ("matrix_address_probe", {"shared": 64, "count": 8}, "not aligned to 16"),
        ("matrix_address_probe", {"shared": 64, "count": 64}, "outside the 64 bytes of shared memory"),
        ("copy_address_probe", {"shared": 64, "count": 8}, "not aligned to 16"),
        ("copy_address_probe", {"shared": 8, "count": 0}, "outside the 8 bytes of shared memory"),
        ("copy_address_probe", {"shared": 64, "count": 64}, "outside every tensor"),
        ("global_probe", {"count": 16}, "outside every tensor"),
        ("global_write_probe", {"count": 16}, "outside every tensor"),
        ("array_index_probe", {"count": 4}, "index outside an array"),
        ("division_probe", {"count": 0}, "division by zero"),
    ],
)
def test_a_mistake_ends_the_launch_and_is_named(function, launch, message):
    tensors = {"a": guarded_empty((16,), torch.float32), "out": guarded_empty((16,), torch.float32)}
    with pytest.raises(EmulationError, match=rf"^{function}, block 0, thread -?\d+: .*{message}"):
        run_probe(function, **tensors, **launch)
    assert run_probe("poison_probe", torch.zeros(1), shared=64).isnan().all(), "the next launch starts afresh"


def test_reading_before_a_tensor_is_noticed():
    source = guarded(torch.ones(16), at="start")
    assert run_probe("global_probe", floats(1), source, count=0) == 1
    with pytest.raises(EmulationError, match="outside every tensor"):
        run_probe("global_probe", floats(1), source, count=-1)


@pytest.mark.parametrize("at", ["start", "end"])
def test_writing_just_behind_a_tensor_is_noticed(at):
    run_probe("global_write_probe", guarded_empty((13,), torch.float32, at), count=12)
    with pytest.raises(EmulationError, match="was written 0 bytes behind its end"):
        run_probe("global_write_probe", guarded_empty((13,), torch.float32, at), count=13)


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr("emulator.TIME_LIMIT", 1)
    with pytest.raises(EmulationError, match="time limit"):
        run_probe("endless_probe", torch.zeros(1, dtype=torch.int32))


def test_what_is_not_valid_is_not_read():
    run_probe("invalid_copy_probe", floats(1), shared=1024)


def test_shared_memory_is_poisoned_for_every_block():
    out = torch.zeros(4, dtype=torch.int32)
    assert run_probe("poison_probe", out, grid=4, shared=200).tolist() == [-1] * 4


def test_a_missing_barrier_shows_for_some_order_of_the_warps():
    right = torch.arange(64, dtype=torch.int32) ^ 32
    seen = []
    for seed in range(8):
        with use_runtime("cpu", EmulatorRuntime(seed)):
            seen.append(run_probe("missing_barrier_probe", torch.empty_like(right), threads=64, shared=256))
    assert not all(torch.equal(result, right) for result in seen)
    assert not all(torch.equal(result, seen[0]) for result in seen), "the order depends on the seed"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("function", "config", "message"),
    [
        ("missing_barrier_probe", "", "race: .* and no barrier is in between"),
        ("missing_warp_barrier_probe", "", "race: .* and no collective of the warp is in between"),
        ("copy_probe", "16, false, true", "race: the asynchronous copy has not been waited for by thread"),
        ("copy_probe", "16, true, false", "race: .* and no barrier is in between"),
        ("copy_probe", "16", None),
        ("barrier_probe", "", None),
    ],
)
def test_a_race_is_found_in_any_order(function, config, message, seed):
    source, out = torch.arange(300 * 4, dtype=torch.int32), torch.zeros(300 * 4, dtype=torch.int32)
    launch = {"config": config, "count": 300, "threads": 128 if function == "barrier_probe" else 64, "shared": 2048}
    with use_runtime("cpu", EmulatorRuntime(seed, watches_races=True)):
        if message is None:
            run_probe(function, out, source, **launch)
        else:
            with pytest.raises(EmulationError, match=message):
                run_probe(function, out, source, **launch)


@pytest.mark.parametrize("config", ["16, false, true", "16, true, false"], ids=["no wait", "no barrier"])
def test_a_missing_wait_or_barrier_around_asynchronous_copies_shows(config):
    source = torch.arange(300 * 4, dtype=torch.int32)
    launch = {"count": 300, "threads": 64, "shared": 2 * 64 * 16}
    right = run_probe("copy_probe", torch.empty_like(source), source, config="16", **launch)
    assert not torch.equal(run_probe("copy_probe", torch.empty_like(source), source, config=config, **launch), right)


def test_the_same_seed_gives_the_same_run():
    source = torch.arange(300 * 4, dtype=torch.int32)
    results = []
    for _ in range(2):
        with use_runtime("cpu", EmulatorRuntime(seed=5)):
            out = torch.empty_like(source)
            results.append(
                run_probe("copy_probe", out, source, config="16, false, false", count=300, threads=64, shared=2048)
            )
    assert torch.equal(*results)


def test_host_mistakes_are_named():
    out = floats(16)
    with pytest.raises(SharedMemoryError, match="232449 bytes of shared memory; there are 232448"):
        run_probe("poison_probe", out, shared=(227 << 10) + 1)
    with pytest.raises(LaunchError, match="3 bytes of arguments; ProbeArguments has 32"):
        runtime.kernel(probe_source("poison_probe"), CPU).launch(1, 64, b"abc")
    with pytest.raises(LaunchError, match="multiple of 32"):
        run_probe("poison_probe", out, shared=64, threads=48)
    with pytest.raises(CompilationError, match="no_such_probe"):
        run_probe("no_such_probe", out)


def test_a_grid_of_nothing_runs_nothing():
    runtime.kernel(probe_source("division_probe"), CPU).launch(0, 0, PROBE.pack(count=0))


def test_allocations_can_be_guarded():
    with guarded_allocations():
        fresh, zeros = torch.empty(2, 8), torch.zeros(3)
    assert fresh.isnan().all()
    assert zeros.tolist() == [0, 0, 0]
    with pytest.raises(EmulationError, match="outside every tensor"):
        run_probe("global_write_probe", fresh, count=16)


def test_guarding_keeps_values_and_strides():
    packed = torch.randn(2, 5, 3, 4, 8)
    for part in packed.unbind(2):
        copy = guarded(part)
        assert copy.stride() == part.stride()
        assert torch.equal(copy, part)


def test_sources_compile_side_by_side():
    sources = [probe_source("round_probe", config) for config in ("half", "bf16", "half")]
    runtime.prepare(sources, CPU)
    assert all(isinstance(source, KernelSource) for source in sources)
