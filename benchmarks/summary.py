"""What a set of results says: improvements in the paper's form, shares won, tables for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

CHOSEN = ("fused", "native")  # what the dispatcher picks on a GPU, and on a CPU
BASELINES = ("naive", "gemm", "reference", "dense", "flex", "natten")


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, the facts of its runs included; the line that a run was cut off in is left out.

    A file that is not there holds none.
    """
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(path: Path) -> TextIO:
    """`path`, made with its folder where it is not there, opened for further lines; a line cut short stays its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text() if path.exists() else ""
    file = path.open("a")
    if earlier and not earlier.endswith("\n"):
        file.write("\n")
    return file


def load(
    paths: list[Path], index: Sequence[str] = ("suite", "key", "method", "direction")
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Records of one or more JSON-lines files (of those alike in `index` the newest) and the facts of their runs."""
    everything = [record for path in paths for record in records(path)]
    facts = [{"suite": r.get("suite", "-")} | r["environment"] for r in everything if "environment" in r]
    frame = pd.DataFrame([record for record in everything if "environment" not in record])
    if len(frame):
        frame = frame.drop_duplicates(list(index), keep="last").reset_index(drop=True)
        if "seconds" not in frame:
            frame["seconds"] = math.nan  # nothing could be timed
    return frame, facts


def improvements(frame: pd.DataFrame, over: str) -> pd.DataFrame:
    """Improvement of each method over `over` in the paper's form: `old time / new time - 1` in %, average [min, max].

    One row per suite, dtype, direction and method, with the share of problems won and how many were compared.
    """
    timed = frame[frame["status"] == "ok"].assign(dtype=lambda f: f["case"].map(lambda case: case["dtype"]))
    index = ["suite", "key", "dtype", "direction"]
    wide = timed.pivot_table(index=index, columns="method", values="seconds", aggfunc="last")
    if over not in wide:
        return pd.DataFrame()
    rows = []
    for method in wide.columns.drop(over):
        gain = (wide[over] / wide[method] - 1).dropna() * 100
        for (suite, dtype, direction), values in gain.groupby(level=["suite", "dtype", "direction"]):
            facts = {"suite": suite, "dtype": dtype, "direction": direction, "method": method, "over": over}
            rows.append(facts | _spread(values))
    return pd.DataFrame(rows)


def precision_gains(frame: pd.DataFrame) -> pd.DataFrame:
    """Improvement of 16 bits over float32 of the same method, over the problems measured in both; as `improvements`."""
    timed = frame[frame["status"] == "ok"].assign(
        dtype=lambda f: f["case"].map(lambda case: case["dtype"]),
        problem=lambda f: f["key"].str.replace(r"/b?float\d+/", "/", regex=True),
    )
    index = ["suite", "problem", "direction", "method"]
    wide = timed.pivot_table(index=index, columns="dtype", values="seconds", aggfunc="last")
    if "float32" not in wide:
        return pd.DataFrame()
    rows = []
    for dtype in wide.columns.drop("float32"):
        gain = (wide["float32"] / wide[dtype] - 1).dropna() * 100
        for (suite, direction, method), values in gain.groupby(level=["suite", "direction", "method"]):
            facts = {"suite": suite, "dtype": dtype, "direction": direction, "method": method, "over": "float32"}
            rows.append(facts | _spread(values))
    return pd.DataFrame(rows)


def _spread(gain: pd.Series) -> dict[str, float]:
    """Average, least and most of improvements in %, the share of problems won, and how many there are."""
    return {
        "average": gain.mean(),
        "min": gain.min(),
        "max": gain.max(),
        "won": (gain > 0).mean(),
        "problems": len(gain),
    }


# arXiv 2403.04690 on an A100, forward, then forward + backward: average improvement in %, and [min, max] where given.
PAPER_KERNELS = {
    ("paper-1d", "float16", "forward", "gemm"): "548 [-53, 3025]",
    ("paper-1d", "float16", "forward", "fused"): "1759 [60, 11885]",
    ("paper-2d", "float16", "forward", "gemm"): "193 [-57, 862]",
    ("paper-2d", "float16", "forward", "fused"): "958 [0, 7169]",
    ("paper-3d", "float16", "forward", "fused"): "1135 [118, 5497]",
    ("paper-1d", "float32", "forward", "gemm"): "874 [-31, 3565]",
    ("paper-1d", "float32", "forward", "fused"): "978 [13, 4419]",
    ("paper-2d", "float32", "forward", "gemm"): "386 [-43, 1933]",
    ("paper-2d", "float32", "forward", "fused"): "564 [-30, 4043]",
    ("paper-3d", "float32", "forward", "fused"): "712 [25, 3029]",
    ("paper-1d", "float16", "both", "gemm"): "502",
    ("paper-1d", "float16", "both", "fused"): "844",
    ("paper-2d", "float16", "both", "gemm"): "92",
    ("paper-2d", "float16", "both", "fused"): "385",
    ("paper-3d", "float16", "both", "fused"): "447",
}


def beside_the_paper(gains: pd.DataFrame) -> pd.DataFrame:
    """Improvements over `naive`, each as `average [min, max]` in %, beside the paper's own; empty where it has none."""
    rows = []
    for row in gains.to_dict("records"):
        published = PAPER_KERNELS.get((row["suite"], row["dtype"], row["direction"], row["method"]))
        if published and row["over"] == "naive":
            ours = f"{row['average']:,.0f} [{row['min']:,.0f}, {row['max']:,.0f}]"
            kept = {name: row[name] for name in ("suite", "dtype", "direction", "method")}
            rows.append(
                kept | {"here, %": ours, "paper (A100), %": published, "won": row["won"], "problems": row["problems"]}
            )
    return pd.DataFrame(rows)


def case_table(frame: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Microseconds of each method on each case of a direction, with the floor and the share of it that the backend
    which the dispatcher picks reaches, where known."""
    chosen = frame[frame["direction"] == direction]
    times = (
        chosen.pivot_table(index=["suite", "name"], columns="method", values="seconds", aggfunc="last", sort=False)
        * 1e6
    )
    if "floor_seconds" in chosen:
        floors = chosen.groupby(["suite", "name"], sort=False)["floor_seconds"].first() * 1e6
        times.insert(0, "floor", floors)
        for method in CHOSEN:
            if method in times:
                times[f"{method}, share of floor"] = times["floor"] / times[method]
    return times.reset_index().rename_axis(columns=None)


def transfer_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Fine-tuned against from scratch: for each number of epochs the test top-1 in % over the seeds.

    Each side at the learning rate whose mean validation accuracy is best; of equal ones, the lowest.
    """
    rows = []
    for (epochs, side), runs in frame.groupby(["epochs", "side"], sort=False):
        rate = runs.groupby("rate")["val_top1"].mean().idxmax()
        test = 100 * runs[runs["rate"] == rate]["test_top1"]
        rows.append(
            {
                "epochs": epochs,
                "side": side,
                "learning rate": rate,
                "test top-1, mean, %": test.mean(),
                "lowest": test.min(),
                "highest": test.max(),
                "seeds": len(test),
            }
        )
    return pd.DataFrame(rows)


def format_number(value: object) -> str:
    """A figure as a table shows it: three significant digits, `-` for none."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if math.isnan(value):
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, numbers rounded."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(format_number(value) for value in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)
