"""The pictures of a report, each a matplotlib figure as a data URI, so that one HTML file holds all of it."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks import summary
from benchmarks.cases import DTYPES, Case
from benchmarks.floors import Ceilings
from benchmarks.models import PAPER, label, on_gpu_backends

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
    "timm": "#444444",
    "nondeterministic": "#5dade2",
}


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI under its title; a wide one takes the page's whole width."""

    uri: str
    title: str
    wide: bool = False


def _picture(figure: Figure, title: str, wide: bool = False) -> Picture:
    """The figure as SVG, the same bytes every time; the figure is closed."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastna"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return Picture("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), title, wide)


def _axes(title: str, width: float = 7.0, height: float = 4.2) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _plain_ticks(axis: Any) -> None:
    """1, 10, 10,000 instead of powers on a logarithmic axis; a short one gets figures between the powers too."""
    low, high = axis.get_view_interval()
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axis.set_major_formatter(plain)
    axis.set_minor_locator(LogLocator(subs=(2, 5) if high < 100 * low else ()))
    axis.set_minor_formatter(plain)


def _timed(frame: pd.DataFrame, direction: str) -> pd.DataFrame:
    chosen = frame[(frame["status"] == "ok") & (frame["direction"] == direction)].copy()
    for field in dataclasses.fields(Case):
        chosen[field.name] = [tuple(v) if isinstance(v := case[field.name], list) else v for case in chosen["case"]]
    chosen["tokens"] = [math.prod(space) for space in chosen["space"]]
    chosen["tokens in a window"] = [math.prod(window) for window in chosen["window"]]
    return chosen


ALIKE = ("batch", "heads", "head_dim", "dtype", "rpb", "stride", "causal")
SWEPT = {"tokens": ("window",), "tokens in a window": ("space",)}


def speed_against(frame: pd.DataFrame, direction: str, title: str) -> list[Picture]:
    """Microseconds against length and against window: a line joins problems that differ in that alone.

    A picture without any line of three problems says nothing about growth and is left out; a suite that has neither
    is shown problem by problem.
    """
    timed = _timed(frame, direction)
    found = []
    for over, fixed in SWEPT.items():
        lines = [
            (str(method), rows.sort_values(over))
            for (method, *_), rows in timed.groupby(["method", *ALIKE, "dilation", *fixed], sort=False)
            if rows[over].nunique() >= 3
        ]
        if not lines:
            continue
        name = f"{title}, {direction}: time against {over}"
        figure, axes = _axes(name)
        for method, rows in lines:
            seen = method in axes.get_legend_handles_labels()[1]
            axes.plot(
                rows[over], rows["seconds"] * 1e6, marker="o", markersize=3, linewidth=1.2,
                color=COLOURS.get(method), label="_" if seen else method,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=over, ylabel="microseconds")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.legend()
        found.append(_picture(figure, name))
    if not found and len(timed):
        found.append(_problem_points(timed, direction, title))
    return found


def gain_against(frame: pd.DataFrame, over: str, direction: str, title: str) -> list[Picture]:
    """How many times as fast as `over` each method is, against length and window: a sample's problems as points."""
    timed = _timed(frame, direction)
    before = timed[timed["method"] == over].set_index("key")["seconds"]
    timed = timed[(timed["method"] != over) & timed["key"].isin(before.index)]
    found = []
    for axis in SWEPT if len(timed) else ():
        name = f"{title}, {direction}: speed over {over} against {axis}"
        figure, axes = _axes(name)
        for method, rows in timed.groupby("method"):
            ratios = before[rows["key"]].to_numpy() / rows["seconds"]
            axes.scatter(rows[axis], ratios, s=14, label=method, color=COLOURS.get(str(method)))
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=f"time of {over} / time")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.legend()
        found.append(_picture(figure, name))
    return found


def _problem_points(timed: pd.DataFrame, direction: str, title: str) -> Picture:
    """Microseconds of each problem by name, a point for each method."""
    wide = timed.pivot_table(index="name", columns="method", values="seconds", aggfunc="last", sort=False) * 1e6
    name = f"{title}, {direction}: time of each problem"
    figure, axes = _axes(name, 12, 1.2 + 0.27 * len(wide))
    for method in wide.columns:
        axes.scatter(wide[method], range(len(wide)), label=method, color=COLOURS.get(str(method)))
    axes.set(xscale="log", xlabel="microseconds", yticks=range(len(wide)), yticklabels=list(wide.index))
    axes.invert_yaxis()
    _plain_ticks(axes.xaxis)
    axes.legend()
    return _picture(figure, name, wide=True)


def precision_bars(gains: pd.DataFrame, title: str) -> Picture | None:
    """How many times as fast 16 bits are as float32, the average and the range; None where both were not measured."""
    if gains.empty:
        return None
    name = f"{title}: speed in 16 bits over float32"
    figure, axes = _axes(name)
    ratios = gains[["average", "min", "max"]] / 100 + 1
    spread = [ratios["average"] - ratios["min"], ratios["max"] - ratios["average"]]
    labels = [f"{row['method']}\n{row['dtype']}\n{row['direction']}" for row in gains.to_dict("records")]
    axes.bar(
        labels, ratios["average"], yerr=spread, capsize=3, color=[COLOURS.get(m, "#bbbbbb") for m in gains["method"]]
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="time in float32 / time")
    return _picture(figure, name)


def paper_bars(gains: pd.DataFrame, title: str) -> Picture | None:
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
    name = f"{title}: improvement over naive, average, beside the paper's"
    figure, axes = _axes(name)
    wide.plot.bar(ax=axes, rot=0, color=["#1b6ca8", "#bbbbbb"])
    axes.set(ylabel="%")
    return _picture(figure, name)


def improvement_spread(frame: pd.DataFrame, over: str, direction: str, title: str) -> Picture | None:
    """How many times as fast as `over` each method is across the problems of a suite: quartiles, least and most."""
    timed = _timed(frame, direction)
    wide = timed.pivot_table(index="key", columns="method", values="seconds", aggfunc="last")
    if over not in wide or len(wide.columns) < 2:
        return None
    every = {method: (wide[over] / wide[method]).dropna() for method in wide.columns if method != over}
    ratios = {method: ratio for method, ratio in every.items() if len(ratio)}
    name = f"{title}, {direction}: speed over {over}"
    figure, axes = _axes(name)
    axes.boxplot(list(ratios.values()), tick_labels=list(ratios), whis=(0, 100))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", ylabel=f"time of {over} / time")
    _plain_ticks(axes.yaxis)
    return _picture(figure, name)


def roofline(frame: pd.DataFrame, ceilings: Ceilings, dtype: str, title: str) -> Picture | None:
    """Useful TFLOP/s against FLOP per byte in `dtype`, under the device's two ceilings; a peer counts only its window.

    `dense` multiplies every pair of tokens, of which few are useful: it has no place under this roof.
    """
    rate = ceilings.flops_per_second.get(DTYPES[dtype])
    timed = _timed(frame, "forward")
    timed = timed[(timed["dtype"] == dtype) & (timed["method"] != "dense")]
    if timed.empty or rate is None:
        return None
    timed["intensity"] = timed["tflops"] * 1e12 / (timed["gbytes"] * 1e9)
    name = f"{title}, forward: roofline, {dtype}"
    figure, axes = _axes(name)
    for method, rows in timed.groupby("method"):
        axes.scatter(rows["intensity"], rows["tflops"], s=14, label=method, color=COLOURS.get(str(method)))
    low, high = timed["intensity"].min() / 2, max(timed["intensity"].max() * 2, rate / ceilings.bytes_per_second * 2)
    xs = [low, rate / ceilings.bytes_per_second, high]
    axes.plot(xs, [min(x * ceilings.bytes_per_second, rate) / 1e12 for x in xs], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte", ylabel="useful TFLOP/s")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.legend()
    return _picture(figure, name)


def change_spread(changes: pd.DataFrame) -> Picture:
    """Speed-ups of a comparison, one box for each suite, direction and method: quartiles, least and most."""
    groups = changes.groupby(["suite", "direction", "method"], sort=False)["speed-up"]
    name = "Kernels: time before / time now"
    figure, axes = _axes(name, 12, 1.2 + 0.3 * groups.ngroups)
    labels = [", ".join(map(str, key)) for key, _ in groups]
    axes.boxplot(
        [values for _, values in groups][::-1], tick_labels=labels[::-1], whis=(0, 100), orientation="horizontal"
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time before / time now")
    _plain_ticks(axes.xaxis)
    return _picture(figure, name, wide=True)


def _model_colour(column: str) -> tuple[float, float, float, float]:
    """The backend's colour, paler where the model is compiled: columns are named by `benchmarks.models.label`."""
    backend, *how = column.split(", ")
    return to_rgba(COLOURS.get(backend, "#bbbbbb"), 0.5 if "compile" in how else 1.0)


def model_bars(frame: pd.DataFrame, mode: str, precision: str) -> Picture | None:
    """images/s of every model by backend, beside the paper's fused figure (A100)."""
    rows = frame[(frame["status"] == "ok") & (frame["mode"] == mode) & (frame["precision"] == precision)]
    rows = rows.assign(method=[label(row) for row in rows.to_dict("records")])
    wide = rows.pivot_table(index="model", columns="method", values="images_per_second", aggfunc="last", sort=False)
    if wide.empty:
        return None
    if mode == "inference" and on_gpu_backends(wide.columns):
        column = 5 if precision == "float32" else 2
        wide["paper, fused (A100)"] = [PAPER[model][column] if model in PAPER else float("nan") for model in wide.index]
    name = f"Models: {mode}, {precision}"
    figure, axes = _axes(name, 12, 1.2 + len(wide) * (0.15 + 0.12 * len(wide.columns)))
    wide.iloc[::-1].plot.barh(ax=axes, color=[_model_colour(str(column)) for column in wide.columns], width=0.8)
    axes.set(xlabel="images/s", ylabel="")
    return _picture(figure, name, wide=True)
