"""The pictures of a report, each a matplotlib figure as a data URI, so that one HTML file holds all of it."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from benchmarks import summary
from benchmarks.floors import Ceilings
from benchmarks.models import PAPER, label

COLOURS = {
    "fused": "#1b6ca8",
    "gemm": "#e08e45",
    "naive": "#8c8c8c",
    "native": "#2e8b57",
    "tiled": "#9acd6b",
    "reference": "#b5a642",
    "flex": "#a33b8f",
    "dense": "#c0392b",
    "natten": "#6c5ce7",
}


def as_uri(figure: Figure) -> str:
    """The figure as `data:image/svg+xml;base64,...`; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _axes(title: str, width: float = 7.0, height: float = 4.0) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _timed(frame: pd.DataFrame, direction: str) -> pd.DataFrame:
    chosen = frame[(frame["status"] == "ok") & (frame["direction"] == direction)].copy()
    for field in ("space", "window", "batch", "heads", "dtype"):
        chosen[field] = [case[field] for case in chosen["case"]]
    chosen["tokens"] = [math.prod(space) for space in chosen["space"]]
    return chosen


def speed_against(frame: pd.DataFrame, direction: str, title: str) -> list[str]:
    """Microseconds against tokens, window and dtype: a picture for each that varies, one line or bar per method."""
    timed = _timed(frame, direction)
    if timed.empty:
        return []
    timed["window size"] = [math.prod(window) for window in timed["window"]]
    found = []
    for over in ("tokens", "window size"):
        if timed[over].nunique() < 3:
            continue
        figure, axes = _axes(f"{title}: {direction}")
        for method, rows in timed.groupby("method"):
            line = rows.groupby(over)["seconds"].median().sort_index() * 1e6
            axes.plot(line.index, line.to_numpy(), marker="o", label=method, color=COLOURS.get(str(method)))
        axes.set(xscale="log", yscale="log", xlabel=over, ylabel="microseconds (median)")
        axes.legend()
        found.append(as_uri(figure))
    if timed["dtype"].nunique() > 1:
        wide = timed.pivot_table(index="dtype", columns="method", values="seconds", aggfunc="median") * 1e6
        figure, axes = _axes(f"{title}: {direction}, by dtype")
        wide.plot.bar(ax=axes, rot=0, color=[COLOURS.get(str(c), "#bbbbbb") for c in wide.columns])
        axes.set(yscale="log", xlabel="", ylabel="microseconds (median)")
        found.append(as_uri(figure))
    return found


def paper_bars(gains: pd.DataFrame, title: str) -> str | None:
    """Average improvements over `naive` beside the paper's; None where the paper has none of them."""
    beside = summary.beside_the_paper(gains)
    if beside.empty:
        return None
    wide = pd.DataFrame(
        {
            name: [float(text.split(" ")[0].replace(",", "")) for text in beside[column]]
            for name, column in (("here", "here, %"), ("paper (A100)", "paper (A100), %"))
        },
        index=[f"{row['dtype']}, {row['direction']}\n{row['method']}" for row in beside.to_dict("records")],
    )
    figure, axes = _axes(f"{title}: improvement over naive, average, %")
    wide.plot.bar(ax=axes, rot=0, color=["#1b6ca8", "#bbbbbb"])
    return as_uri(figure)


def improvement_spread(frame: pd.DataFrame, over: str, direction: str, title: str) -> str | None:
    """Each method's improvement over `over` across the problems of a suite, which the paper's bars summarise."""
    timed = _timed(frame, direction)
    wide = timed.pivot_table(index="key", columns="method", values="seconds", aggfunc="last")
    if over not in wide or len(wide.columns) < 2:
        return None
    every = {method: (wide[over] / wide[method]).dropna() for method in wide.columns if method != over}
    ratios = {method: ratio for method, ratio in every.items() if len(ratio)}
    figure, axes = _axes(f"{title}: speed over {over}, {direction}")
    axes.boxplot(list(ratios.values()), tick_labels=list(ratios), whis=(0, 100))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", ylabel=f"time of {over} / time")
    return as_uri(figure)


def roofline(frame: pd.DataFrame, ceilings: Ceilings, rate: float, title: str) -> str | None:
    """TFLOP/s against FLOP per byte, under the device's two ceilings (`rate` FLOP/s, and its memory bandwidth)."""
    timed = _timed(frame, "forward")
    if timed.empty:
        return None
    timed["intensity"] = timed["tflops"] * 1e12 / (timed["gbytes"] * 1e9)
    figure, axes = _axes(title)
    for method, rows in timed.groupby("method"):
        axes.scatter(rows["intensity"], rows["tflops"], s=14, label=method, color=COLOURS.get(str(method)))
    low, high = timed["intensity"].min() / 2, max(timed["intensity"].max() * 2, rate / ceilings.bytes_per_second * 2)
    xs = [low, rate / ceilings.bytes_per_second, high]
    axes.plot(xs, [min(x * ceilings.bytes_per_second, rate) / 1e12 for x in xs], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte", ylabel="useful TFLOP/s")
    axes.legend()
    return as_uri(figure)


def model_bars(frame: pd.DataFrame, mode: str, precision: str) -> str | None:
    """images/s of every model by backend, beside the paper's fused figure (A100)."""
    rows = frame[(frame["status"] == "ok") & (frame["mode"] == mode) & (frame["precision"] == precision)]
    rows = rows.assign(method=[label(row) for row in rows.to_dict("records")])
    wide = rows.pivot_table(index="model", columns="method", values="images_per_second", aggfunc="last", sort=False)
    if wide.empty:
        return None
    if mode == "inference":
        column = 5 if precision == "float32" else 2
        wide["paper, fused (A100)"] = [PAPER[model][column] if model in PAPER else float("nan") for model in wide.index]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(wide) + 1.5))
    wide.iloc[::-1].plot.barh(ax=axes, color=[COLOURS.get(str(c), "#bbbbbb") for c in wide.columns], width=0.8)
    axes.set(xlabel="images/s", ylabel="", title=f"{mode}, {precision}")
    axes.grid(visible=True, axis="x", alpha=0.3)
    return as_uri(figure)
