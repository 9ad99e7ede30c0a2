"""One self-contained HTML report, and the README's Markdown tables, from any set of results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from benchmarks import plots, summary
from benchmarks.cases import DTYPES
from benchmarks.floors import CEILINGS
from benchmarks.models import PAPER

BASELINES = ("naive", "gemm", "dense", "flex", "natten")


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
        pictures = [plots.speed_against(frame, direction, suite)]
        pictures += [plots.improvement_spread(frame, over, direction, suite) for over in ("naive",)]
        section.images += [picture for picture in pictures if picture]
    dtypes = {case["dtype"] for case in frame["case"]}
    if device in CEILINGS:
        for dtype in sorted(dtypes):
            rate = CEILINGS[device].flops_per_second[DTYPES[dtype]]
            rows = frame[[case["dtype"] == dtype for case in frame["case"]]]
            picture = plots.roofline(rows, CEILINGS[device], rate, f"{suite}: roofline, {dtype}")
            section.images += [picture] if picture else []
    gains = [summary.improvements(frame, over) for over in BASELINES]
    gains = [table for table in gains if len(table)]
    if gains:
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
    rows = rows.assign(method=rows["backend"].fillna("-") + rows["compile"].map({True: ", compiled", False: ""}))
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
    index = ["suite", "key", "method", "direction"]
    ok = [frame[frame["status"] == "ok"].set_index(index)[["name", "seconds"]] for frame in (new, old)]
    joined = ok[0].join(ok[1]["seconds"].rename("seconds before"), how="inner")
    joined["speed-up"] = joined["seconds before"] / joined["seconds"]
    return joined.reset_index().drop(columns="key").sort_values("speed-up")


def build(paths: list[Path], against: list[Path] | None = None) -> tuple[str, dict[str, pd.DataFrame]]:
    """The report as HTML, and its main tables by name for Markdown.

    Raises:
        ValueError: none of the files holds a result.
    """
    kernel_paths = [path for path in paths if path.name.startswith("kernels-")]
    model_paths = [path for path in paths if path.name.startswith("models")]
    frame, facts = summary.load(kernel_paths)
    models_frame, model_facts = summary.load(model_paths, index=("suite", "key"))
    if frame.empty and models_frame.empty:
        raise ValueError(
            f"results {[str(path) for path in paths]}: hold no timed problem; run scripts/benchmark_*.py first"
        )
    environments = facts + model_facts
    device = environments[-1]["device"] if environments else ""
    sections: list[Section] = []
    tables: dict[str, pd.DataFrame] = {}
    for suite, rows in frame.groupby("suite", sort=False) if len(frame) else ():
        sections.append(_kernel_section(str(suite), rows, device))
        for direction in rows["direction"].unique():
            tables[f"{suite}, {direction}"] = summary.case_table(rows, direction)
        for over in BASELINES:
            gains = summary.improvements(rows, over)
            if len(gains):
                tables[f"{suite}, improvement over {over}"] = gains
    if len(models_frame):
        sections.append(_model_section(models_frame))
        for mode in models_frame["mode"].unique():
            for precision in models_frame["precision"].unique():
                tables[f"models, {mode}, {precision}"] = model_table(models_frame, mode, precision)
    if against:
        changes = compare(frame, summary.load(against)[0])
        section = Section("Against earlier results", tables=[("Seconds now and before", _html(changes))])
        sections.insert(0, section)
        tables["against"] = changes
    unique: list[dict[str, Any]] = []
    for fact in environments:
        if fact not in unique:
            unique.append(fact)
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.j2").read_text())
    return template.render(environments=unique, sections=sections), {k: v for k, v in tables.items() if len(v)}
