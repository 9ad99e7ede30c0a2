"""One self-contained HTML report, and the README's Markdown tables, from any set of results."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from benchmarks import plots, summary
from benchmarks.cases import SAMPLES
from benchmarks.floors import Ceilings, ceilings_from
from benchmarks.models import CONTEXT, PAPER, label, on_gpu_backends, paper_gain
from benchmarks.plots import Picture


@dataclass(frozen=True)
class Shown:
    """A table as the page shows it: each column's name and whether it holds numbers, and the rows as text."""

    caption: str
    columns: list[tuple[str, bool]]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Section:
    title: str
    texts: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Shown] = field(default_factory=list)

    def show(self, *pictures: Picture | None) -> None:
        self.pictures += [picture for picture in pictures if picture]


def _shown(caption: str, table: pd.DataFrame) -> Shown:
    columns = [(str(column), pd.api.types.is_numeric_dtype(table[column])) for column in table.columns]
    return Shown(caption, columns, [[*map(summary.format_number, row)] for row in table.itertuples(index=False)])


def _kernel_section(suite: str, frame: pd.DataFrame, ceilings: Ceilings | None) -> Section:
    section = Section(suite)
    directions = [d for d in ("forward", "backward", "both") if (frame["direction"] == d).any()]
    timed = set(frame[frame["status"] == "ok"]["method"])
    baseline = next((method for method in ("naive", "dense") if method in timed), None)
    for direction in directions:
        if baseline and suite in SAMPLES:
            section.show(*plots.gain_against(frame, baseline, direction, suite))
        else:
            section.show(*plots.speed_against(frame, direction, suite))
        if baseline:
            section.show(plots.improvement_spread(frame, baseline, direction, suite))
    precisions = summary.precision_gains(frame)
    section.show(plots.precision_bars(precisions, suite))
    for dtype in sorted({case["dtype"] for case in frame["case"]}) if ceilings else ():
        section.show(plots.roofline(frame, ceilings, dtype, suite))
    gains = [table for over in summary.BASELINES if len(table := summary.improvements(frame, over))]
    if gains:
        section.show(plots.paper_bars(gains[0], suite))
        section.tables.append(_shown("Improvement, %", pd.concat(gains).drop(columns="suite")))
    if len(precisions):
        section.tables.append(_shown("Improvement of 16 bits over float32, %", precisions.drop(columns="suite")))
    if len(beside := summary.beside_the_paper(gains[0]) if gains else pd.DataFrame()):
        section.tables.append(_shown("Beside the paper, %", beside.drop(columns="suite")))
    for direction in directions:
        table = summary.case_table(frame, direction).drop(columns="suite")
        section.tables.append(_shown(f"Microseconds, {direction}", table))
    bad = frame[frame["status"] != "ok"].drop_duplicates(["key", "method"])
    if len(bad):
        reasons = bad.groupby(["method", "status"], sort=False)["name"]
        table = reasons.agg(["size", "first", "last"]).reset_index().rename(columns={"size": "problems"})
        section.tables.append(_shown("Not timed, and why", table))
    return section


def _rank_of_model(name: str) -> int:
    """The paper's models in its order, then the others as they come."""
    known = (*PAPER, *CONTEXT)
    return known.index(name) if name in known else len(known)


def _rank_of_column(label: str) -> tuple[bool, str, int]:
    """Columns alike in how models are run side by side, compiled ones last."""
    method, _, how = label.partition(", ")
    methods = ("fused", "native", "gemm", "naive", "tiled")
    return "compile" in how, how, methods.index(method) if method in methods else len(methods)


def model_table(frame: pd.DataFrame, mode: str, precision: str) -> pd.DataFrame:
    """images/s by model and backend, the gain of a backend over the one it replaces, and the paper's figures beside."""
    rows = frame[(frame["status"] == "ok") & (frame["mode"] == mode) & (frame["precision"] == precision)]
    rows = rows.assign(method=[label(row) for row in rows.to_dict("records")])
    wide = rows.pivot_table(index="model", columns="method", values="images_per_second", aggfunc="last", sort=False)
    wide = wide.loc[sorted(wide.index, key=_rank_of_model), sorted(wide.columns, key=_rank_of_column)]
    measured = set(wide.columns)
    for (new, old), how in itertools.product((("fused", "naive"), ("native", "tiled")), ("", ", cuda graph")):
        if {new + how, old + how} <= measured:
            wide[f"{new} over {old}{how}, %"] = (wide[new + how] / wide[old + how] - 1) * 100
    if not on_gpu_backends(measured):
        return wide.reset_index().rename_axis(columns=None)
    gains = [paper_gain(model, mode, precision) for model in wide.index]
    wide["paper, fused over naive, %"] = pd.Series(gains, index=wide.index, dtype=float)
    if mode == "inference":
        first = 3 if precision == "float32" else 0
        for offset, method in enumerate(("naive", "gemm", "fused")):
            figures = [PAPER[model][first + offset] if model in PAPER else None for model in wide.index]
            wide[f"paper {method}"] = pd.Series(figures, index=wide.index, dtype=float)
    return wide.reset_index().rename_axis(columns=None)


LATENCY = ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "attention_share")


def _model_section(frame: pd.DataFrame) -> Section:
    text = "The paper's columns are its A100 figures at batch 128, in FP16 beside 16 bits; it trained without bias."
    section = Section("Models", [text])
    for mode in frame["mode"].unique():
        for precision in frame["precision"].unique():
            table = model_table(frame, mode, precision)
            if len(table):
                section.show(plots.model_bars(frame, mode, precision))
                section.tables.append(_shown(f"images/s, {mode}, {precision}", table))
    how = ["model", "mode", "precision", "backend", "batch_used", *(name for name in LATENCY if name in frame)]
    latencies = frame[frame["status"] == "ok"][how].rename(columns={"batch_used": "batch"})
    section.tables.append(_shown("Latency of a step, milliseconds, and attention's share of it", latencies))
    bad = frame[frame["status"] != "ok"]
    if len(bad):
        section.tables.append(_shown("Not measured, and why", bad[["model", "mode", "backend", "status"]]))
    return section


def compare(new: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """Microseconds of the same case, method and direction in two sets of results, and old over new."""
    if new.empty or old.empty:
        return pd.DataFrame()
    index = ["suite", "key", "method", "direction"]
    ok = [frame[frame["status"] == "ok"].set_index(index)[["name", "seconds"]] for frame in (new, old)]
    joined = ok[0].join(ok[1]["seconds"].rename("before"), how="inner").reset_index()
    joined["speed-up"] = joined["before"] / joined["seconds"]
    joined["us now"], joined["us before"] = joined["seconds"] * 1e6, joined["before"] * 1e6
    return joined[["suite", "name", "method", "direction", "us now", "us before", "speed-up"]].sort_values("speed-up")


def change_summary(changes: pd.DataFrame) -> pd.DataFrame:
    """Geometric mean, least and most of the speed-ups of `compare`, by suite, direction and method."""
    speed_ups = changes.groupby(["suite", "direction", "method"], sort=False)["speed-up"]
    table = speed_ups.agg(lambda ratios: math.exp(ratios.map(math.log).mean())).to_frame("geometric mean")
    return table.assign(least=speed_ups.min(), most=speed_ups.max(), problems=speed_ups.size()).reset_index()


def compare_models(new: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """images/s of the same row of the models' table in two sets of results, and new over old."""
    if new.empty or old.empty:
        return pd.DataFrame()
    ok = [frame[frame["status"] == "ok"].set_index("key") for frame in (new, old)]
    joined = ok[0][["model", "mode", "precision", "backend", "images_per_second"]].join(
        ok[1]["images_per_second"].rename("before"), how="inner"
    )
    joined["speed-up"] = joined["images_per_second"] / joined["before"]
    return joined.rename(columns={"images_per_second": "images/s"}).sort_values("speed-up").reset_index(drop=True)


def data_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Microseconds per image of each step, images/s of a core and its slowest step, for each reader and decoder."""
    steps = [name for name in frame.columns if name.endswith("_us")]
    shown = frame[["reader", "decoder", *steps, "images_per_second_per_core", "bottleneck"]]
    return shown.rename(
        columns=lambda name: name.removesuffix("_us").replace("images_per_second_per_core", "images/s per core")
    )


def task_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds and peak MiB of each command."""
    shown = frame[["task", "what", "seconds", "peak_mib"]]
    return shown.rename(columns={"peak_mib": "peak memory, MiB"})


def _frames(paths: list[Path], needed: bool = True) -> tuple[pd.DataFrame, pd.DataFrame, list[dict[str, Any]]]:
    """Records of kernels and of models, and the facts of the runs they come from.

    Raises:
        ValueError: results are `needed`, and none of the files holds one.
    """
    kernels, facts = summary.load([path for path in paths if path.name.startswith("kernels-")])
    models_paths = [path for path in paths if path.name.startswith("models")]
    models, model_facts = summary.load(models_paths, index=("suite", "key"))
    if needed and kernels.empty and models.empty:
        raise ValueError(f"results {[path.name for path in paths]}: hold no timed problem; run scripts/benchmark_*.py")
    distinct: list[dict[str, Any]] = []
    for fact in facts + model_facts:
        if fact not in distinct:
            distinct.append(fact)
    return kernels, models, distinct


def tables(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """The tables that results hold, by the names under which the README asks for them, such as `floors, forward`."""
    kernels, models, _ = _frames(paths, needed=False)
    found: dict[str, pd.DataFrame] = {}
    for suite, rows in kernels.groupby("suite", sort=False) if len(kernels) else ():
        for direction in rows["direction"].unique():
            found[f"{suite}, {direction}"] = summary.case_table(rows, direction).drop(columns="suite")
        for over in summary.BASELINES:
            found[f"{suite}, improvement over {over}"] = gains = summary.improvements(rows, over)
            if over == "naive":
                found[f"{suite}, beside the paper"] = summary.beside_the_paper(gains)
        found[f"{suite}, improvement over float32"] = summary.precision_gains(rows)
    for mode in models["mode"].unique() if len(models) else ():
        for precision in models["precision"].unique():
            found[f"models, {mode}, {precision}"] = model_table(models, mode, precision)
    return {name: table for name, table in (found | _other_tables(paths)).items() if len(table)}


def _other_tables(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """The tables of results that are neither of kernels nor of models."""
    found: dict[str, pd.DataFrame] = {}
    if cpu := [path for path in paths if path.name == "cpu.jsonl"]:
        records, _ = summary.load(cpu, index=("model", "mode"))
        wide = records.pivot_table(
            index="model", columns="mode", values=["images_per_second", "of_baseline"], sort=False
        )
        wide.columns = [
            f"{mode}, {'images/s' if value == 'images_per_second' else 'of Swin-T'}" for value, mode in wide
        ]
        found["cpu"] = wide.reset_index()
    if memory := [path for path in paths if path.name == "memory.jsonl"]:
        found["memory"] = _memory_table(summary.load(memory, index=("map", "direction"))[0])
    for name, index, make in (
        ("data", ("reader", "decoder", "augmented_on", "image_size"), data_table),
        ("tasks", ("task",), task_table),
        ("transfer-digits", ("epochs", "side", "rate", "seed"), summary.transfer_table),
    ):
        if files := [path for path in paths if path.name == f"{name}.jsonl"]:
            found[name] = make(summary.load(files, index=index)[0])
    return found


def _memory_table(records: pd.DataFrame) -> pd.DataFrame:
    """MiB of query, key, value and output, and the peak of each direction in MiB and as a multiple of those."""
    peaks = records.pivot_table(index=["map", "operands_bytes"], columns="direction", values="peak_bytes", sort=False)
    table = peaks.reset_index().rename(columns={"operands_bytes": "inputs and output, MiB"})
    operands = table["inputs and output, MiB"]
    for direction in peaks.columns:
        table[f"{direction}, of these"] = table[direction] / operands
        table[direction] /= 2**20
    table["inputs and output, MiB"] = operands / 2**20
    return table.rename(columns={direction: f"{direction}, peak MiB" for direction in peaks.columns})


def fill_marked_tables(text: str, root: Path) -> str:
    """`text` with the table behind each `<!-- table: FOLDER: NAME -->` made anew from the results in root / FOLDER.

    Raises:
        ValueError: the folder holds no table of that name.
    """
    known: dict[str, dict[str, pd.DataFrame]] = {}

    def table(match: re.Match[str]) -> str:
        folder, name = match["folder"], match["name"]
        if folder not in known:
            known[folder] = tables(sorted((root / folder).glob("*.jsonl")))
        if name not in known[folder]:
            raise ValueError(f"table {name!r}: {folder} holds no such table; it has {sorted(known[folder])}")
        return f"{match['mark']}\n{summary.markdown(known[folder][name])}\n<!-- end -->"

    marked = r"(?P<mark><!-- table: (?P<folder>\S+): (?P<name>.+?) -->)\n.*?<!-- end -->"
    return re.sub(marked, table, text, flags=re.DOTALL)


def build(paths: list[Path], against: list[Path] | None = None) -> str:
    """The report as one HTML file.

    Raises:
        ValueError: none of the files holds a result.
    """
    kernels, models, facts = _frames(paths)
    ceilings = ceilings_from(facts)
    suites = kernels.groupby("suite", sort=False) if len(kernels) else ()
    sections = [_kernel_section(str(suite), rows, ceilings) for suite, rows in suites]
    if len(models):
        sections.append(_model_section(models))
    if others := _other_tables(paths):
        sections.append(Section("Other measurements", tables=[_shown(*item) for item in others.items()]))
    if against:
        sections.insert(0, _comparison(kernels, models, against))
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.j2").read_text())
    devices = ", ".join(dict.fromkeys(fact["device"] for fact in facts))
    return template.render(device=devices, environment=_environment("Measured on", facts), sections=sections)


def _comparison(kernels: pd.DataFrame, models: pd.DataFrame, against: list[Path]) -> Section:
    """What `against` holds too, now and before."""
    earlier_kernels, earlier_models, earlier = _frames(against)
    changes, model_changes = compare(kernels, earlier_kernels), compare_models(models, earlier_models)
    section = Section("Against earlier results", ["A speed-up above 1 is faster now."])
    if len(changes):
        section.show(plots.change_spread(changes))
        section.tables.append(_shown("Kernels: speed-up by method", change_summary(changes)))
        section.tables.append(_shown("Kernels: every problem, slowest change first", changes))
    if len(model_changes):
        section.tables.append(_shown("Models: images/s now and before", model_changes))
    if not section.tables:
        section.texts = ["No problem or model is in both."]
    section.tables.append(_environment("The earlier results were measured on", earlier))
    return section


def _environment(caption: str, facts: list[dict[str, Any]]) -> Shown:
    """The facts of runs: a row for each run of those that differ, all others once, above; nvidia-smi's one by one."""
    rows = []
    for fact in facts:
        row: dict[str, str] = {}
        for name, value in fact.items():
            if name.startswith("nvidia-smi "):
                row |= zip(name.removeprefix("nvidia-smi ").split(","), value.split(", "), strict=False)
            elif name == "ceilings":
                row |= {f"ceiling, {key.replace('_', ' ')}": f"{rate:.3g}" for key, rate in value.items()}
            else:
                row[name] = value
        rows.append(row)
    table = pd.DataFrame(rows).fillna("-")
    common = [column for column in table.columns[1:] if table[column].nunique() == 1]
    note = " · ".join(f"{column}: {table[column].iloc[0]}" for column in common)
    return dataclasses.replace(_shown(caption, table.drop(columns=common)), note=note)
