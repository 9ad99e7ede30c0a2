"""One self-contained HTML report, and the README's Markdown tables, from any set of results."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from benchmarks import plots, summary
from benchmarks.cases import DTYPES
from benchmarks.data import STEPS
from benchmarks.floors import CEILINGS
from benchmarks.models import PAPER, label


@dataclass
class Section:
    title: str
    texts: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    tables: list[tuple[str, str]] = field(default_factory=list)


def _html(table: pd.DataFrame) -> str:
    return table.to_html(index=False, border=0, formatters=dict.fromkeys(table.columns, summary.format_number))


def _kernel_section(suite: str, frame: pd.DataFrame, device: str) -> Section:
    section = Section(suite)
    directions = [d for d in ("forward", "backward", "both") if (frame["direction"] == d).any()]
    for direction in directions:
        pictures: list[str | None] = [*plots.speed_against(frame, direction, suite)]
        pictures += [plots.improvement_spread(frame, over, direction, suite) for over in ("naive",)]
        section.images += [picture for picture in pictures if picture]
    dtypes = {case["dtype"] for case in frame["case"]}
    if device in CEILINGS:
        for dtype in sorted(dtypes):
            rate = CEILINGS[device].flops_per_second[DTYPES[dtype]]
            rows = frame[[case["dtype"] == dtype for case in frame["case"]]]
            picture = plots.roofline(rows, CEILINGS[device], rate, f"{suite}: roofline, {dtype}")
            section.images += [picture] if picture else []
    gains = [summary.improvements(frame, over) for over in summary.BASELINES]
    gains = [table for table in gains if len(table)]
    if gains:
        picture = plots.paper_bars(gains[0], suite)
        section.images += [picture] if picture else []
        section.tables.append(("Improvement in %, average [min, max]", _html(pd.concat(gains))))
    for direction in directions:
        table = summary.case_table(frame, direction)
        section.tables.append((f"Microseconds, {direction}", _html(table)))
    bad = frame[frame["status"] != "ok"].drop_duplicates(["key", "method"])
    if len(bad):
        section.tables.append(("Not timed, and why", _html(bad[["name", "method", "status"]])))
    return section


def model_table(frame: pd.DataFrame, mode: str, precision: str) -> pd.DataFrame:
    """images/s by model and backend, the gain of `fused` over `naive`, and the paper's figures beside."""
    rows = frame[(frame["status"] == "ok") & (frame["mode"] == mode) & (frame["precision"] == precision)]
    rows = rows.assign(method=[label(row) for row in rows.to_dict("records")])
    wide = rows.pivot_table(index="model", columns="method", values="images_per_second", aggfunc="last", sort=False)
    if {"fused", "naive"} <= set(wide.columns):
        wide["fused over naive, %"] = (wide["fused"] / wide["naive"] - 1) * 100
    if mode == "inference":
        first = 3 if precision == "float32" else 0
        for offset, method in enumerate(("naive", "gemm", "fused")):
            figures = [PAPER[model][first + offset] if model in PAPER else None for model in wide.index]
            wide[f"paper {method}"] = pd.Series(figures, index=wide.index, dtype=float)
    return wide.reset_index()


def _model_section(frame: pd.DataFrame) -> Section:
    section = Section("Models", ["images/s; the paper's columns are its A100 figures at batch 128."])
    for mode in frame["mode"].unique():
        for precision in frame["precision"].unique():
            table = model_table(frame, mode, precision)
            if len(table):
                picture = plots.model_bars(frame, mode, precision)
                section.images += [picture] if picture else []
                section.tables.append((f"{mode}, {precision}", _html(table)))
    return section


def compare(new: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """Seconds of the same case, method and direction in two sets of results, and old over new."""
    if new.empty or old.empty:
        return pd.DataFrame()
    index = ["suite", "key", "method", "direction"]
    ok = [frame[frame["status"] == "ok"].set_index(index)[["name", "seconds"]] for frame in (new, old)]
    joined = ok[0].join(ok[1]["seconds"].rename("seconds before"), how="inner")
    joined["speed-up"] = joined["seconds before"] / joined["seconds"]
    return joined.reset_index().drop(columns="key").sort_values("speed-up")


def compare_models(new: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """images/s of the same row of the models' table in two sets of results, and new over old."""
    if new.empty or old.empty:
        return pd.DataFrame()
    ok = [frame[frame["status"] == "ok"].set_index("key") for frame in (new, old)]
    joined = ok[0][["model", "mode", "precision", "backend", "images_per_second"]].join(
        ok[1]["images_per_second"].rename("before"), how="inner"
    )
    joined["speed-up"] = joined["images_per_second"] / joined["before"]
    return joined.rename(columns={"images_per_second": "images/s"}).sort_values("speed-up")


def data_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Microseconds per image of each step, images/s of a core and its slowest step, for each reader and decoder."""
    shown = frame[["reader", "decoder", *(f"{step}_us" for step in STEPS), "images_per_second_per_core", "bottleneck"]]
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
    for mode in models["mode"].unique() if len(models) else ():
        for precision in models["precision"].unique():
            found[f"models, {mode}, {precision}"] = model_table(models, mode, precision)
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
    return {name: table for name, table in found.items() if len(table)}


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
    device = facts[-1]["device"] if facts else ""
    sections = (
        [_kernel_section(str(s), rows, device) for s, rows in kernels.groupby("suite", sort=False)]
        if len(kernels)
        else []
    )
    if len(models):
        sections.append(_model_section(models))
    if against:
        earlier_kernels, earlier_models, _ = _frames(against)
        changes = [
            ("Kernels, seconds now and before", compare(kernels, earlier_kernels)),
            ("Models, images/s now and before", compare_models(models, earlier_models)),
        ]
        tables = [(caption, _html(table)) for caption, table in changes if len(table)]
        texts = [] if tables else ["No problem or model is in both."]
        sections.insert(0, Section("Against earlier results", texts, tables=tables))
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.j2").read_text())
    return template.render(environments=facts, sections=sections)
