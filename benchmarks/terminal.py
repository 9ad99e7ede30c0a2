"""Tables on a terminal. Where the output goes to a file or a pipe they are as wide as they need: nothing is cut."""

from __future__ import annotations

import sys

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks import summary

WIDTH_OF_A_FILE = 400


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, highlight=False)


def show(target: Console, title: str, frame: pd.DataFrame) -> None:
    """Prints `frame` under `title`, numbers rounded and to the right; a narrow terminal folds what it cannot hold."""
    table = Table(title=title)
    for column in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column), justify="right" if numeric else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*map(summary.format_number, row))
    target.print(table)
