"""Sources become cubins: rendered, compiled by NVRTC (which needs no GPU), cached by content."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.build_cache import cache_directory
from kernels.cuda import jit, runtime
from kernels.cuda.jit import KernelSource, instantiate
from kernels.errors import CompilationError, KernelError, LaunchError, MissingComponentError, UnsupportedDeviceError
from kernels.problem import Axis, Problem

HEADER = """
#pragma once
#include "fastna/primitives.cuh"
#include "scale.cuh"
namespace fastna {
struct ScaleArguments { float* data; };
template <class T, int N>
FASTNA_DEVICE void scale(const ScaleArguments& args) {
  args.data[block_index() * N + thread_index()] *= SCALE;
}
}
"""
SOURCE = KernelSource("probe.cuh", "scale", "half, 64", "ScaleArguments", threads=64)


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """A folder with one kernel of two headers, and an empty cache."""
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "probe.cuh").write_text(HEADER)
    (folder / "scale.cuh").write_text("#define SCALE 2.0f\n")
    monkeypatch.setattr(jit, "INCLUDE_ROOTS", (folder, *jit.INCLUDE_ROOTS))
    monkeypatch.setenv("FASTNA_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def problem_on(device: str) -> Problem:
    return Problem(1, (Axis(8, 3),), 1, 1, 8, 8, 1.0, torch.float32, torch.device(device))


def test_the_rendered_unit_instantiates_the_template_with_its_launch_bounds():
    text = KernelSource(
        "src/x.cuh", "run", instantiate("Tile", torch.bfloat16, 8, True), "RunArguments", 128, 2
    ).render()
    assert '#include "src/x.cuh"' in text
    assert "__launch_bounds__(128, 2)" in text
    assert "const __grid_constant__ fastna::RunArguments args" in text
    assert "fastna::run<Tile<bf16, 8, true>>(args);" in text


def test_a_kernel_compiles_to_a_whole_cubin_and_says_what_it_uses(roots):
    compiled = jit.compile_kernel(SOURCE, "sm_80")
    binary = compiled.path.read_bytes()
    assert binary[:4] == b"\x7fELF"
    sections_at, entry_size, entries = struct.unpack_from("<Q", binary, 0x28) + struct.unpack_from("<HH", binary, 0x3A)
    assert sections_at + entry_size * entries <= len(binary)
    assert 0 < compiled.registers <= 255
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert not compiled.cached
    assert 0 < compiled.seconds < 60


def test_the_cache_answers_the_second_time(roots):
    first = jit.compile_kernel(SOURCE, "sm_80")
    again = jit.compile_kernel(SOURCE, "sm_80")
    assert (again.path, again.log, again.cached) == (first.path, first.log, True)


@pytest.mark.parametrize("damage", ["cut", "empty", "no log", "cut log"])
def test_a_damaged_cache_is_built_again(roots, damage):
    first = jit.compile_kernel(SOURCE, "sm_80")
    binary, log = first.path.read_bytes(), first.path.with_suffix(".log")
    if damage == "no log":
        log.unlink()
    elif damage == "cut log":
        log.write_text(log.read_text()[:-1])
    else:
        first.path.write_bytes(binary[:100] if damage == "cut" else b"")
    again = jit.compile_kernel(SOURCE, "sm_80")
    assert not again.cached
    assert again.path.read_bytes()[:4] == b"\x7fELF"
    assert jit.compile_kernel(SOURCE, "sm_80").log == again.log


def test_without_a_home_the_cache_is_still_somewhere(roots, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "FASTNA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert cache_directory().is_absolute()


def test_a_header_that_is_not_there_is_named(roots):
    with pytest.raises(CompilationError, match=r'cannot open source file "absent\.cuh"'):
        jit.compile_kernel(KernelSource("absent.cuh", "scale", "", "ScaleArguments", 64), "sm_80")


def test_everything_that_decides_the_result_is_in_the_key(roots, monkeypatch):
    paths = [jit.compile_kernel(SOURCE, "sm_80").path, jit.compile_kernel(SOURCE, "sm_90a").path]
    (roots / "scale.cuh").write_text("#define SCALE 3.0f\n")  # a header of a header
    paths.append(jit.compile_kernel(SOURCE, "sm_80").path)
    monkeypatch.setenv("FASTNA_LINEINFO", "1")
    paths.append(jit.compile_kernel(SOURCE, "sm_80").path)
    other = KernelSource(SOURCE.header, SOURCE.function, "half, 32", SOURCE.arguments, 64)
    paths.append(jit.compile_kernel(other, "sm_80").path)
    assert len(set(paths)) == len(paths)


def test_processes_that_want_the_same_kernel_at_once_compile_it_once(roots, tmp_path):
    script = (
        "import sys; from pathlib import Path; from kernels.cuda import jit\n"
        "jit.INCLUDE_ROOTS = (Path(sys.argv[1]), *jit.INCLUDE_ROOTS)\n"
        "source = jit.KernelSource('probe.cuh', 'scale', 'half, 64', 'ScaleArguments', 64)\n"
        "print(jit.compile_kernel(source, 'sm_80').cached)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(jit.KERNELS.parent)}
    command = [sys.executable, "-c", script, str(roots)]
    racers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    cached = [racer.communicate()[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(cached) == ["False", "True"]
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 1
    leftovers = [path for path in (tmp_path / "cache").rglob("*.*") if path.suffix not in {".cubin", ".log", ".lock"}]
    assert not leftovers


def test_a_rejected_kernel_shows_the_compilers_log_and_leaves_nothing_behind(roots, tmp_path):
    (roots / "scale.cuh").write_text("#define SCALE undeclared_name\n")
    with pytest.raises(CompilationError, match=r"NVRTC rejects scale<half, 64> of probe\.cuh(?s:.*)undeclared_name"):
        jit.compile_kernel(SOURCE, "sm_80")
    assert not list((tmp_path / "cache").rglob("*.cubin"))


def test_a_cache_that_cannot_be_written_is_named(roots, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTNA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(KernelError, match=r"cannot write the kernel cache .*set FASTNA_CACHE_DIR"):
        jit.compile_kernel(SOURCE, "sm_80")


def test_cupy_missing_says_what_to_install(roots, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", None)
    jit._nvrtc.cache_clear()
    with pytest.raises(MissingComponentError, match=r'pip install "cupy-cuda13x\[ctk\]"'):
        jit.compile_kernel(SOURCE, "sm_80")
    jit._nvrtc.cache_clear()


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((8, 5), "sm_80")],
)
def test_code_is_for_exactly_the_device(capability, architecture):
    assert jit.architecture_of(capability) == architecture


@pytest.mark.parametrize(("capability", "message"), [((7, 5), "need 8.0"), ((99, 0), "install a newer CuPy")])
def test_devices_that_cannot_be_served_are_told_why(capability, message):
    with pytest.raises(UnsupportedDeviceError, match=message):
        jit.architecture_of(capability)


def test_without_an_emulator_a_cpu_has_no_runtime():
    assert "tensors are on cpu" in str(runtime.why_not_here(problem_on("cpu")))
    with pytest.raises(UnsupportedDeviceError, match="tensors are on cpu"):
        runtime.kernel(SOURCE, torch.device("cpu"))


def test_an_installed_runtime_serves_its_devices_and_leaves_again():
    class Refusing:
        def why_not(self, device: torch.device) -> str:
            return "not today"

    with runtime.use_runtime("cpu", Refusing()):
        assert runtime.why_not_here(problem_on("cpu")) == "not today"
    assert runtime.installed_runtime(torch.device("cpu")) is None


def test_headers_are_found_through_headers():
    headers = jit.collect_headers('#include "fastna/window.cuh"\n', jit.INCLUDE_ROOTS)
    assert {"fastna/window.cuh", "fastna/arguments.cuh", "fastna/types.cuh"} <= set(headers)
    assert headers["fastna/types.cuh"] == Path(jit.KERNELS / "include/fastna/types.cuh").read_text()


class Driver:
    """Launches only in context 77, and in none where it `refuses`."""

    class CUDADriverError(RuntimeError):
        pass

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.current = self.launches = 0

    def launchKernel(self, *arguments: int) -> None:
        if self.refuses or self.current != 77:
            raise self.CUDADriverError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        self.launches += 1

    def ctxGetCurrent(self) -> int:
        return self.current

    def ctxSetCurrent(self, context: int) -> None:
        self.current = context


def launched_by(driver: Driver) -> None:
    kernel = object.__new__(runtime.CudaKernel)
    kernel.source, kernel.device, kernel._driver = SOURCE, torch.device("cuda", 0), driver
    kernel._function, kernel._context, kernel._shared_allowed = 1, 77, 0
    kernel._attributes = runtime.Attributes(registers=32, local_bytes=0)
    kernel.launch(1, 0, b"", stream=0)


def test_a_thread_without_a_context_gets_the_kernels(monkeypatch):
    """As a thread of autograd that begins with a launch."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0)
    driver = Driver(refuses=False)
    launched_by(driver)
    assert (driver.launches, driver.current) == (1, 77)
    with pytest.raises(LaunchError, match="INVALID_CONTEXT"):
        launched_by(Driver(refuses=True))
