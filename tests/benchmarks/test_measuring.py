"""The measuring itself: legal problems, right counts, checked answers, sweeps that resume, reports with the figures."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import timm
import torch
from rich.console import Console
from torch.autograd import DeviceType

from benchmarks import account, evaluation, floors, methods, models, plots, report, summary, sweep
from benchmarks.cases import SUITES, Case, suite
from benchmarks.correctness import Answer, sampled_error
from benchmarks.timing import measure
from kernels import na2d
from kernels.problem import Axis
from models.layers import NeighborhoodAttention

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Case("small", 2, (8, 9), 2, 16, (3, 3), dtype="float32", rpb=True)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(floors.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(floors.PRODUCT_SIDE, "cpu", 128)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_case_of_a_suite_is_a_legal_problem(name):
    cases = suite(name)
    assert cases
    assert len({case.key for case in cases}) == len(cases)
    assert len(suite(name, quick=True)) <= len(cases)
    for case in cases:
        for axis in case.problem(CPU).axes:
            assert 1 <= axis.stride <= axis.window
            assert axis.window * axis.dilation <= axis.length


def test_paper_suites_are_a_thousand_problems_and_repeatable():
    assert [len(suite(f"paper-{rank}d")) for rank in (1, 2, 3)] == [1000, 1000, 1000]
    assert [case.key for case in suite("paper-2d")] == [case.key for case in suite("paper-2d")]


def test_unknown_suite_is_named():
    with pytest.raises(ValueError, match=r"suite='paper-4d'.*paper-3d"):
        suite("paper-4d")


@pytest.mark.parametrize(
    "axis", [Axis(9, 3), Axis(10, 4, 2), Axis(11, 5, 2, 3), Axis(9, 4, 1, 2, True), Axis(13, 3, 4, 1, True)]
)
def test_pairs_counts_what_windows_hold(axis):
    count = 0
    for token in range(axis.length):
        start, end = axis.window_at(token // axis.dilation, axis.group_length(token % axis.dilation))
        count += end - start
    assert floors.pairs(axis) == count


def test_floor_of_the_first_level_of_nat_is_its_four_tensors():
    case = next(case for case in suite("floors") if case.name == "56^2 h2 d1")
    seconds = floors.floor_seconds(case.problem(CPU), floors.CEILINGS["NVIDIA H200"], "forward")
    assert seconds == pytest.approx(4 * 128 * 56 * 56 * 2 * 32 * 2 / 4.3e12)


def test_tile_waste_is_one_for_a_dense_map_and_grows_with_the_halo():
    dense = Case("dense", 1, (8, 8), 1, 16, (8, 8)).problem(CPU)
    assert floors.tile_waste(dense, (8, 8), (8, 8)) == 1.0
    sliding = Case("sliding", 1, (32, 32), 1, 16, (7, 7)).problem(CPU)
    assert floors.tile_waste(sliding, (8, 8), (8, 8)) > floors.tile_waste(sliding, (4, 4), (4, 4)) > 1.0


MIXED = Case("mixed", 2, (6, 7, 8), 2, 16, (2, 3, 4), (1, 2, 1), (2, 1, 3), (False, False, True), "float32", True)
ONE_KEY = Case("one key", 1, (9,), 1, 16, (1,), dtype="float32")


@pytest.mark.parametrize(
    "case", [SMALL, MIXED, Case("one key", 1, (9,), 1, 16, (1,), dtype="float32")], ids=lambda c: c.name
)
@pytest.mark.parametrize("name", ["tiled", "reference", "dense"])
def test_right_answers_and_gradients_pass_at_any_shape(case, name):
    prepared = methods.METHODS[name](case, inputs := methods.make_inputs(case, CPU, 0, True), True)
    assert sampled_error(prepared.solves, inputs, prepared.answer()) < 1e-6


@pytest.mark.parametrize("wrong", range(4), ids=["output", "query", "key", "value"])
@pytest.mark.parametrize("case", [SMALL, MIXED], ids=lambda c: c.name)
def test_a_wrong_head_of_any_tensor_is_seen(case, wrong):
    inputs = methods.make_inputs(case, CPU, 0, True)
    answer = methods.METHODS["tiled"](case, inputs, True).answer()
    tensors = [answer.output, *answer.gradients]
    tensors[wrong] = tensors[wrong].detach().clone()
    tensors[wrong][..., 1, :] *= 1.001
    assert sampled_error(case, inputs, Answer(tensors[0], tuple(tensors[1:]))) > 1e-4


def test_flex_attention_gets_the_neighborhood_as_its_mask():
    inputs = methods.make_inputs(MIXED, CPU, 0, False)
    order, block_mask = methods._tile_mask(MIXED.space, MIXED.problem(CPU).axes, CPU)
    query, key, value = (x.flatten(1, -3)[:, order].transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    index = torch.arange(len(order))
    mask = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None])
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    restored = output.transpose(1, 2)[:, order.argsort()].unflatten(1, MIXED.space)
    assert sampled_error(MIXED.replace(rpb=False), inputs, Answer(restored, None)) < 1e-6
    assert torch.equal(order.sort().values, index)


def _natten(releases):
    """What stands in for NATTEN: the reference under the argument names of a release."""

    def new(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False):
        return na2d(
            query, key, value, kernel_size, stride=stride, dilation=dilation, is_causal=is_causal, backend="reference"
        )

    def old(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None):
        return na2d(
            query, key, value, kernel_size, dilation=dilation, is_causal=is_causal, rpb=rpb, backend="reference"
        )

    return SimpleNamespace(na2d=new) if releases == "new" else SimpleNamespace(functional=SimpleNamespace(na2d=old))


@pytest.mark.parametrize("release", ["new", "old"])
def test_natten_is_called_as_its_release_wants(release, monkeypatch):
    stand_in = _natten(release)
    monkeypatch.setitem(sys.modules, "natten", stand_in)
    if release == "old":
        monkeypatch.setitem(sys.modules, "natten.functional", stand_in.functional)
    inputs = methods.make_inputs(SMALL, CPU, 0, True)
    prepared = methods.METHODS["natten"](SMALL, inputs, True)
    assert prepared.solves.rpb == (release == "old")
    assert sampled_error(prepared.solves, inputs, prepared.answer()) < 1e-6
    strided = SMALL.replace(stride=(2, 1))
    if release == "old":
        with pytest.raises(methods.Unsupported, match="stride"):
            methods.METHODS["natten"](strided, inputs, True)
    else:
        prepared = methods.METHODS["natten"](strided, inputs, True)
        assert sampled_error(prepared.solves, inputs, prepared.answer()) < 1e-6


def test_a_sweep_resumes_and_records_what_it_could_not_time(tmp_path, monkeypatch):
    path = tmp_path / "kernels-small.jsonl"
    names, directions = ["tiled", "dense", "natten", "flex"], ["forward", "backward"]
    monkeypatch.setenv("FASTNA_COMMIT", "f00ba47")
    first = sweep.run("small", [SMALL], names, CPU, directions, path, seconds=0.01)
    assert len(first) == len(names) * len(directions)
    with path.open("a") as file:
        file.write('{"suite": "small", "key": "cut sho')
    assert sweep.run("small", [SMALL], names, CPU, directions, path, seconds=0.01) == []
    second = sweep.run("small", [SMALL, MIXED], ["tiled"], CPU, ["forward"], path, seconds=0.01)
    assert [record["name"] for record in second] == ["mixed"]
    frame, facts = summary.load([path])
    assert len(frame) == len(first) + 1
    assert [fact["suite"] for fact in facts] == ["small", "small"]  # the cut line took none of the second run's
    assert floors.ceilings_from(facts) == floors.ceilings_of(CPU, [torch.float32])
    assert facts[0]["torch"] == torch.__version__
    assert facts[0]["commit"] == "f00ba47"
    by_method = frame.groupby("method")["status"].first()
    assert by_method["tiled"] == by_method["dense"] == "ok"
    assert by_method["flex"].startswith("unsupported")
    assert (frame[frame["status"] == "ok"]["seconds"] > 0).all()


def test_a_slow_call_is_timed_less_often():
    slept = []
    timings = measure({"slow": [lambda: slept.append(time.sleep(0.01))], "fast": [lambda: None]}, CPU, seconds=1e-4)
    assert timings["slow"].calls == 3
    assert len(slept) == 3 + 3  # the first call and the two that tell how long one takes are not timed
    assert timings["fast"].calls >= 7


def test_memory_that_one_method_lacks_is_not_held_against_the_others(tmp_path, monkeypatch):
    def hungry(case, inputs, gradient):
        calls = iter(range(2))  # it answers, and is measured for its peak; timing it fails

        def forward():
            if next(calls, None) is None:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return right(case, inputs, gradient).forward()

        return methods.Prepared(forward, None, case)

    right = methods.METHODS["tiled"]
    monkeypatch.setitem(methods.METHODS, "dense", hungry)
    path = tmp_path / "kernels-small.jsonl"
    records = sweep.run("small", [SMALL], ["tiled", "dense"], CPU, ["forward"], path, seconds=0.01)
    assert {record["method"]: record["status"] for record in records} == {"tiled": "ok", "dense": "out of memory"}
    assert records[0]["peak_bytes"] >= SMALL.batch * 8 * 9 * 2 * 16 * 4  # its output, at least
    assert records[0]["floor_share"] > 0


def test_a_wrong_method_is_never_timed(tmp_path, monkeypatch):
    right = methods.METHODS["tiled"]

    def wrong(case, inputs, gradient):
        prepared = right(case, inputs, gradient)
        return methods.Prepared(lambda: prepared.forward() * 1.01, prepared.backward, case)

    monkeypatch.setitem(methods.METHODS, "tiled", wrong)
    (record,) = sweep.run_case(SMALL, ["tiled"], CPU, ["forward"], 0.01)
    assert record["status"].startswith("wrong")
    assert "seconds" not in record


def _records(cases, seconds):
    """Records of forward passes as a sweep writes them: `seconds` by method, a figure for each case."""
    return pandas.DataFrame(
        {"suite": "s", "key": case.key, "name": case.name, "case": dataclasses.asdict(case), "method": method,
         "direction": "forward", "status": "ok", "seconds": time, "tflops": 1.0, "gbytes": 1.0}
        for method, times in seconds.items() for case, time in zip(cases, times, strict=True)
    )  # fmt: skip


def test_improvement_is_in_the_papers_form():
    cases = [SMALL.replace(name=name, batch=batch) for name, batch in (("a", 1), ("b", 2))]
    row = summary.improvements(_records(cases, {"naive": (4.0, 1.0), "fused": (1.0, 2.0)}), "naive").iloc[0]
    assert (row["average"], row["min"], row["max"]) == (pytest.approx(125), pytest.approx(-50), pytest.approx(300))
    assert row["won"] == 0.5
    assert row["problems"] == 2


def test_results_of_which_none_could_be_timed_are_still_tables(tmp_path):
    path = tmp_path / "kernels-one.jsonl"
    record = {
        "suite": "one",
        "key": "a",
        "name": "a",
        "method": "gemm",
        "direction": "forward",
        "case": {"dtype": "float16"},
    }
    path.write_text(json.dumps(record | {"status": "failed: no GPU"}) + "\n")
    frame, _ = summary.load([path])
    assert summary.case_table(frame, "forward").empty
    assert summary.improvements(frame, "naive").empty
    assert summary.precision_gains(frame).empty


def test_16_bits_are_compared_with_float32_on_the_same_problem():
    cases = [SMALL.replace(batch=b, dtype=d) for b, d in ((1, "float32"), (1, "bfloat16"), (2, "bfloat16"))]
    (row,) = summary.precision_gains(_records(cases, {"fused": (3.0, 2.0, 9.0)})).to_dict("records")
    assert (row["dtype"], row["method"], row["problems"]) == ("bfloat16", "fused", 1)
    assert row["average"] == pytest.approx(50)


def test_a_line_of_the_report_joins_problems_that_differ_in_one_thing(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_picture", lambda figure, title, wide=False: drawn.append((figure, title, wide)))
    grid = [Case("", 1, (n,), 1, 16, (w,), dtype="float32") for n in (64, 128, 256) for w in (3, 5, 7)]
    plots.speed_against(_records(grid, {"naive": range(1, 10), "fused": range(1, 10)}), "forward", "grid")
    assert [title for _, title, _ in drawn] == [f"grid, forward: time against {over}" for over in plots.SWEPT]
    assert [len(figure.axes[0].lines) for figure, _, _ in drawn] == [6, 6]
    assert all(len(figure.axes[0].get_legend().texts) == 2 for figure, _, _ in drawn)
    drawn.clear()
    plots.speed_against(_records([SMALL, MIXED], {"fused": (1.0, 2.0)}), "forward", "mixed")
    assert [(title, wide) for _, title, wide in drawn] == [("mixed, forward: time of each problem", True)]


def test_models_stand_beside_the_papers_gain_in_training_too():
    rows = [("nat_mini", "fused", 30.0), ("nat_mini", "naive", 10.0), ("swin", None, 20.0)]
    frame = pandas.DataFrame(
        [{"model": model, "mode": "training", "precision": "bfloat16", "backend": backend, "status": "ok",
          "images_per_second": rate} for model, backend, rate in rows]
    )  # fmt: skip
    table = report.model_table(frame, "training", "bfloat16").set_index("model")
    assert table.loc["nat_mini", "fused over naive, %"] == pytest.approx(200)
    assert table.loc["nat_mini", "paper, fused over naive, %"] == pytest.approx((19.4 / 16.6 - 1) * 100)
    assert table.loc["swin", "timm"] == 20.0
    graphed = report.model_table(frame.assign(cuda_graph=True), "training", "bfloat16").set_index("model")
    assert graphed.loc["nat_mini", "fused over naive, cuda graph, %"] == pytest.approx(200)
    assert "paper, fused over naive, %" in graphed


def test_the_suite_of_nat_holds_every_attention_layer_of_every_model():
    held = {case.key for case in suite("nat")}
    needed = set()

    def note(layer, arguments):
        height, width = arguments[0].shape[1:3]
        window, dilation = layer.window_for(height, width)
        case = Case("", 128, (height, width), layer.num_heads, 32, window, dilation, rpb=True)
        needed.add(case.key)

    for name in (name for module in models.ZOO for name in timm.list_models(module=module)):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        for layer in model.modules():
            if isinstance(layer, NeighborhoodAttention):
                layer.register_forward_pre_hook(note)
        size = models.image_size(name)
        model(torch.empty(1, 3, size, size, device="meta"))
    assert needed <= held, sorted(needed - held)


def test_device_time_is_counted_once_on_a_gpu():
    def event(key, kind, own, total=0.0, parent=None):
        return SimpleNamespace(
            key=key, name=key, device_type=kind, count=1, is_user_annotation=False, cpu_parent=parent,
            self_device_time_total=own, device_time_total=total or own,
        )  # fmt: skip

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    outer = event("fastna::forward", cpu, 0.0, 30.0)
    events = [
        outer,
        event("fastna::forward", cpu, 30.0, parent=outer),  # the same call, passed on by autograd
        event("strip_forward", cuda, 30.0),
        event("aten::addmm", cpu, 70.0),  # the profiler books the kernel on the operator too
        event("gemm_kernel", cuda, 70.0),
    ]
    assert models.device_times(events, cuda=True) == [("gemm_kernel", 1, 70.0), ("strip_forward", 1, 30.0)]
    assert models.share_of_attention(events, cuda=True) == pytest.approx(0.3)


def test_memory_running_out_halves_the_batch_and_other_failures_are_rows(monkeypatch, tmp_path):
    def once(setting, *_):
        if setting.batch > 2:
            raise torch.OutOfMemoryError("too much")
        if setting.model == "broken":
            raise ValueError
        return {"images_per_second": 1.0}

    monkeypatch.setattr(models, "_measure_once", once)
    settings = [models.Setting(name, "inference", batch=8) for name in ("fits", "broken")]
    path = tmp_path / "models.jsonl"
    models.run(settings, CPU, path)
    fits, broken = (record for record in summary.records(path) if "key" in record)
    assert (fits["status"], fits["batch"], fits["batch_used"]) == ("ok", 8, 2)
    assert broken["status"].startswith("failed: ValueError")
    models.run([*settings, models.Setting("fits", "inference", batch=8, loading=True)], CPU, path)
    assert [record["loading"] for record in summary.records(path) if "key" in record] == [False, False, True]


def test_the_account_of_a_model_has_the_floors_of_its_attention_and_products():
    ceilings = floors.CEILINGS["NVIDIA H200"]
    table = account.account("nat_mini", 128, torch.bfloat16, ceilings)
    attention = table[(table["kind"] == "attention") & (table["stage"] == "levels.0")].iloc[0]
    case = next(case for case in suite("nat") if case.name == "tiny, level 0: 56^2 h2 d1")
    bias = 4 * 2 * 13 * 13 / 4.3e12
    floor = floors.floor_seconds(case.problem(CPU), ceilings, "forward")
    assert attention["calls"] == 3
    assert attention["floor us"] == pytest.approx(3e6 * floor, rel=1e-3, abs=3e6 * bias)
    # 2.7 GMACs, as published: twice as many operations, attention's included.
    assert table["GFLOP"].sum() == pytest.approx(128 * 2 * 2.7, rel=0.03)
    assert account.fused_seconds(table, ceilings) < table["floor us"].sum() / 1e6


def test_the_evaluation_shares_its_time_and_goes_on_where_it_stopped(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: clock[0])
    done = {"long": 0.0, "short": 0.0}
    needed = {"long": 100.0, "short": 10.0}

    def step(name, weight):
        def run(deadline):
            spent = min(needed[name] - done[name], deadline - clock[0])
            clock[0] += spent
            done[name] += spent
            return done[name] >= needed[name]

        return evaluation.Step(name, weight, run)

    steps = [step("long", 1), step("short", 1)]
    console = Console(quiet=True)
    assert [s.title for s in evaluation.run(steps, 60.0, console)] == ["long"]
    assert done == {"long": 50.0, "short": 10.0}  # half its share, then what the short one left
    assert evaluation.run(steps, 60.0, console) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_evaluation_covers_every_suite_and_the_papers_models(device, tmp_path):
    titles = " ".join(step.title for step in evaluation.plan(torch.device(device), tmp_path, quick=True))
    needed = set(SUITES) - ({"floors", "paper-1d", "paper-2d", "paper-3d"} if device == "cpu" else set())
    assert all(name in titles for name in (*needed, "models"))


def test_the_command_lines_measure_report_and_compare(tmp_path):
    def run(script, *arguments):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    problem = [
        "--space",
        8,
        8,
        "--window",
        3,
        3,
        "--heads",
        2,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--seconds",
        0.01,
    ]
    run("benchmark_kernels.py", *problem, "--direction", "forward", "backward", "--output", tmp_path)
    rows = ["--models", "nat_mini", "--batch", 1, "--device", "cpu", "--seconds", 0.1, "--precision", "float32"]
    run("benchmark_models.py", *rows, "--backends", "tiled", "--output", tmp_path / "models.jsonl")
    printed = run("report.py", tmp_path, "--against", tmp_path / "kernels-one.jsonl")
    html = (tmp_path / "report.html").read_text()
    assert "| nat_mini |" in printed
    assert "tiled" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    record = next(r for r in map(json.loads, (tmp_path / "models.jsonl").read_text().splitlines()) if "key" in r)
    assert record["images_per_second"] > 0
    assert record["latency_p50_ms"] <= record["latency_p99_ms"]
    assert 0 < record["attention_share"] < 1
    predicted = run("simulate.py", "--against", ROOT / "results" / "nvidia-h200" / "kernels-floors.jsonl")
    assert "13 measured" in predicted
    simulated = run("simulate.py", "--against", tmp_path / "kernels-one.jsonl")
    assert "1 measured" in simulated
    windows = run("simulate.py", "--space", 56, 56, "--heads", 2, "--windows")
    assert windows.index("window 3") < windows.index("window 56")
    trace = tmp_path / "trace.json"
    run("profile_model.py", "nat_mini", "--batch", 1, "--device", "cpu", "--precision", "float32", "--trace", trace)
    spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    assert any(event["name"].startswith("fastna::") and event["dur"] > 0 for event in spans)


def test_what_runs_on_a_gpu_machine_needs_no_training_stack():
    names = ["benchmark", "benchmark_kernels", "benchmark_models", "benchmark_tiles", "benchmark_host", "report"]
    names += ["compile_kernels", "profile_model", "sanitize", "simulate"]
    program = (
        "import runpy, sys\n"
        "for name in ('hydra', 'omegaconf', 'webdataset', 'datasets'): sys.modules[name] = None\n"
        "for path in sys.argv[1:]: runpy.run_path(path)\n"
    )
    paths = [str(ROOT / "scripts" / f"{name}.py") for name in names]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, cwd=ROOT)
