"""Choices are measured once, kept for every process, and dropped with the sources they were measured on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import backend
from kernels.cuda import jit, strip, tuning
from kernels.cuda.dry import DryKernel, DryRuntime
from kernels.cuda.jit import KernelSource
from kernels.cuda.runtime import DeviceProperties, use_runtime
from kernels.problem import Axis, Problem

CPU = torch.device("cpu")
PROPERTIES = DeviceProperties((9, 0), 132, 227 << 10, name="Some GPU 5000")
SECONDS = {"slow": 3.0, "middling": 2.0, "fast": 1.0}


class Clock(DryRuntime):
    """A device where a candidate takes the seconds that `SECONDS` gives it."""

    def __init__(self, properties: DeviceProperties = PROPERTIES, ticking: bool = True) -> None:
        super().__init__(properties)
        self.started: list[str] = []
        self.ticking = ticking

    def timer(self, device: torch.device) -> Callable[[Sequence[Callable[[], str]]], list[float]] | None:
        return (lambda launches: [SECONDS[launch()] for launch in launches]) if self.ticking else None

    def choose(self, candidates: Sequence[str] = tuple(SECONDS), name: str = "probe: 7 x 7") -> str:
        def start(candidate: str) -> Callable[[], str]:
            self.started.append(candidate)
            return lambda: candidate

        with use_runtime("cpu", self):
            return tuning.choose(
                name, candidates, CPU, lambda text: KernelSource("probe.cuh", text, "", "X", 32), start
            )


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty tables, and a kernel of one header."""
    for name in ("tables", "sources"):
        (tmp_path / name).mkdir()
    (tmp_path / "sources" / "probe.cuh").write_text("version 1\n")
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(jit, "INCLUDE_ROOTS", (tmp_path / "sources", *jit.INCLUDE_ROOTS))
    monkeypatch.setenv("FASTNA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTNA_TUNING", raising=False)
    return


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning" / "some-gpu-5000.json"


def test_a_choice_is_measured_once_and_readable(kept: Path) -> None:
    first, second = Clock(), Clock()
    assert (first.choose(), first.started) == ("fast", list(SECONDS))
    assert len(first.asked) == 3, "compiled side by side beforehand"
    assert (second.choose(), second.started) == ("fast", [])
    entry = json.loads(kept.read_text())["probe: 7 x 7"]
    assert entry["choice"] == "fast"
    assert entry["microseconds"] == {"slow": 3e6, "middling": 2e6, "fast": 1e6}
    assert second.choose(name="probe: 9 x 9") == "fast"
    assert second.started == list(SECONDS), "another class of problem"


def test_other_sources_are_measured_anew(tmp_path: Path) -> None:
    Clock().choose()
    (tmp_path / "sources" / "probe.cuh").write_text("version 2\n")
    again = Clock()
    again.choose()
    assert again.started == list(SECONDS)


def test_a_candidate_that_is_no_more_is_not_chosen() -> None:
    Clock().choose()
    assert Clock().choose(["slow", "middling"]) == "middling"


def test_the_guess_stays_unless_another_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, "middling", 1.02)
    assert Clock().choose(["middling", "fast"]) == "middling"


def test_the_repositorys_table_comes_first(tmp_path: Path, kept: Path) -> None:
    Clock().choose()
    table = json.loads(kept.read_text())
    table["probe: 7 x 7"]["choice"] = "middling"
    (tmp_path / "tables" / kept.name).write_text(json.dumps(table))
    assert Clock().choose() == "middling"


@pytest.mark.parametrize("text", ["{", "[]", '{"probe: 7 x 7": 3}'])
def test_a_spoilt_table_is_ignored_with_a_warning_and_replaced(kept: Path, text: str) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text(text)
    with pytest.warns(UserWarning, match=f"ignoring the tuning table {kept}"):
        assert Clock().choose() == "fast"
    assert Clock().choose() == "fast"
    assert json.loads(kept.read_text())["probe: 7 x 7"]["choice"] == "fast"


def test_tables_alone_or_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, expected in (
        ("tables", "slow"),
        ("off", "slow"),
        ("measure", "fast"),
        ("tables", "fast"),
        ("off", "slow"),
    ):
        monkeypatch.setenv("FASTNA_TUNING", mode)
        clock = Clock()
        assert clock.choose() == expected, mode
        assert bool(clock.started) == (mode == "measure")
    monkeypatch.setenv("FASTNA_TUNING", "yes")
    with pytest.raises(ValueError, match="FASTNA_TUNING='yes' must be one of measure, tables, off"):
        Clock().choose()


def test_where_nothing_may_be_measured_the_guess_is_taken_and_not_kept(kept: Path) -> None:
    """During a capture and on the emulator there is no timer; deterministic algorithms forbid what may differ."""
    assert Clock(ticking=False).choose() == "slow"
    assert Clock(DeviceProperties((9, 0), 4, 1 << 10)).choose() == "slow"  # a device without a name has no table
    torch.use_deterministic_algorithms(True)
    try:
        assert Clock().choose() == "slow"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not kept.exists()


def test_a_table_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTNA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"not kept: .*set FASTNA_CACHE_DIR"):
        assert Clock().choose() == "fast"


def test_more_candidates_than_a_first_call_has_time_for_are_refused() -> None:
    with pytest.raises(ValueError, match="5 candidates; at most 4"):
        Clock().choose(list("abcde"))


def test_processes_at_once_agree_and_lose_nothing(tmp_path: Path, kept: Path) -> None:
    """Each times the two candidates of a shared class the other way round, and one class of its own."""
    script = (
        "import sys, test_tuning; from kernels.cuda import jit; from pathlib import Path\n"
        "jit.INCLUDE_ROOTS = (Path(sys.argv[1]), *jit.INCLUDE_ROOTS)\n"
        "test_tuning.SECONDS = {'a': 1.0, 'b': 2.0} if sys.argv[2] == '0' else {'a': 2.0, 'b': 1.0}\n"
        "clock = test_tuning.Clock()\n"
        "clock.choose(['a', 'b'], f'probe: {sys.argv[2]}')\n"
        "print(clock.choose(['a', 'b'], 'probe: shared'))\n"
    )
    path = os.pathsep.join((str(jit.KERNELS.parent), str(Path(__file__).parent)))
    command = [sys.executable, "-c", script, str(tmp_path / "sources")]
    racers = [
        subprocess.Popen([*command, str(i)], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    chosen = [racer.communicate()[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert chosen[0] == chosen[1]
    assert set(json.loads(kept.read_text())) == {"probe: 0", "probe: 1", "probe: shared"}


REPOSITORY = jit.KERNELS / "cuda" / "tables"


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("*.json")), ids=lambda path: path.stem)
def test_the_repositorys_tables_hold_what_was_measured(path: Path) -> None:
    """The choice is among the candidates and is the fastest, or as good as the guess, which is the first."""
    for name, entry in json.loads(path.read_text()).items():
        assert name.startswith(("strip_forward: ", "hopper_strip_forward: "))
        assert entry["microseconds"][entry["choice"]] <= min(entry["microseconds"].values()) / tuning.MARGIN
        assert entry["from"]


def test_strip_takes_its_tile_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry for the H200 decides; a device without a table has the formula's tile."""
    axis = Axis(14, 7)
    problem = Problem(128, (axis, axis), 8, 8, 32, 32, 32**-0.5, torch.bfloat16, CPU, rpb_dtype=torch.float32)
    h200 = DeviceProperties((9, 0), 132, 227 << 10, "NVIDIA H200")
    guess, *_, other = strip.candidate_tiles(problem, h200)
    entry = {"choice": str(other), "sources": tuning._digest_of([strip.plan(problem, guess).source])}
    table = tuning.TABLES / "nvidia-h200.json"
    table.write_text(json.dumps({strip._tuned_as(problem): entry}))
    tensors = [torch.empty(128, 14, 14, 8, 32, dtype=torch.bfloat16) for _ in range(3)]
    for device, tile in ((h200, other), (replace(h200, name=""), guess)):
        dry = DryRuntime(device)
        with use_runtime("cpu", dry):
            backend.forward(strip, problem, strip.Operands(*tensors, torch.empty(8, 13, 13)))
        assert list(dry.asked) == [strip.plan(problem, tile).source]


def test_strip_tries_its_tiles_with_one_set_of_results() -> None:
    """A first call needs no more memory than the next."""
    axis = Axis(28, 7)
    problem = Problem(1, (axis, axis), 1, 1, 32, 32, 32**-0.5, torch.float16, CPU)
    launches = []

    class Timing(DryRuntime):
        def timer(self, device: torch.device) -> Callable[[Sequence[Callable[[], object]]], list[float]]:
            def measure(calls: Sequence[Callable[[], object]]) -> list[float]:
                for call in calls:
                    call()
                return [1.0] * len(calls)

            return measure

        def kernel(self, source: KernelSource, device: torch.device) -> DryKernel:
            kernel = super().kernel(source, device)
            kernel.launch = lambda grid, shared_bytes, arguments, stream=None: launches.append(arguments)
            return kernel

    tensors = [torch.empty(1, 28, 28, 1, 32, dtype=torch.float16) for _ in range(3)]
    with use_runtime("cpu", Timing(PROPERTIES)):
        strip.bind_forward(problem, strip.Operands(*tensors))
    assert len(launches) == len(strip.candidate_tiles(problem, PROPERTIES)) > 1
    written = {arguments[strip.STRIP_FORWARD.offsets["output.data"] :][:8] for arguments in launches}
    assert len(written) == 1
