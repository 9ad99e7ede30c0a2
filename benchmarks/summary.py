"""What a set of results says: improvements in the paper's form, shares won, tables for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd


def load(
    paths: list[Path], index: Sequence[str] = ("suite", "key", "method", "direction")
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Records of one or more JSON-lines files (the newest of those alike in `index` wins) and the facts of their runs.

    Raises:
        FileNotFoundError: one of the files is not there.
    """
    records, facts = [], []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that an interrupted sweep was writing
            if "environment" in record:
                facts.append(record["environment"])
            else:
                records.append(record)
    frame = pd.DataFrame(records)
    if len(frame):
        frame = frame.drop_duplicates(list(index), keep="last").reset_index(drop=True)
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
            rows.append(
                {
                    "suite": suite,
                    "dtype": dtype,
                    "direction": direction,
                    "method": method,
                    "over": over,
                    "average": values.mean(),
                    "min": values.min(),
                    "max": values.max(),
                    "won": (values > 0).mean(),
                    "problems": len(values),
                }
            )
    return pd.DataFrame(rows)


def case_table(frame: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Microseconds of each method on each case of a direction, with the floor and `fused`'s share of it where known."""
    chosen = frame[frame["direction"] == direction]
    times = (
        chosen.pivot_table(index=["suite", "name"], columns="method", values="seconds", aggfunc="last", sort=False)
        * 1e6
    )
    if "floor_seconds" in chosen:
        floors = chosen.groupby(["suite", "name"], sort=False)["floor_seconds"].first() * 1e6
        times.insert(0, "floor", floors)
        if "fused" in times:
            times["fused, share of floor"] = times["floor"] / times["fused"]
    return times.reset_index()


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
