"""Compile every kernel family's configurations for every architecture, without a GPU; fail on a spill.

python scripts/compile_kernels.py                         all of them
python scripts/compile_kernels.py --quick                 two of each kernel, sm_80 and sm_90a
python scripts/compile_kernels.py --only strip --architecture sm_89
python scripts/compile_kernels.py --record results/compile/kernels.jsonl --seconds 200

A record is brought up to date: rows of what was compiled now replace those of the same kernel and architecture, rows of
kernels that are no more go. What is in the cache is not compiled again, so that a run that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.cuda import census
from kernels.errors import KernelError

Row = dict[str, str | int | float | None]


def row(entry: census.Entry) -> Row:
    """What a record says of one compilation."""
    compiled, source = entry.compiled, entry.source
    return {
        "family": entry.family,
        "kernel": source.name,
        "architecture": entry.architecture,
        "threads": source.threads,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "stack_bytes": compiled.stack_bytes,
        "shared_bytes": source.shared_bytes,
        "seconds": round(compiled.seconds, 2),
        "defect": entry.defect,
    }


def bring_up_to_date(path: Path, entries: Sequence[census.Entry]) -> None:
    """Puts the rows of `entries` into the record at `path`; one JSON object a line, in the order of `census.work`."""
    rows: dict[tuple[object, ...], Row] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            old = json.loads(line)
            rows[old["family"], old["kernel"], old["architecture"], old["threads"]] = old
    rows |= {(e.family, e.source.name, e.architecture, e.source.threads): row(e) for e in entries}
    known = [(family, source.name, architecture, source.threads) for family, source, architecture in census.work()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(rows[key])}\n" for key in dict.fromkeys(known) if key in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="first and last configuration of each kernel, few architectures"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels with this in their family or name")
    parser.add_argument("--architecture", action="append", choices=census.ARCHITECTURES, help="may be given again")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the rows there too, a JSON object a line")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing more is compiled")
    options = parser.parse_args()
    architectures = options.architecture or (census.QUICK_ARCHITECTURES if options.quick else census.ARCHITECTURES)

    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table("family", "kernel", "architecture", title="Kernels")
    for heading in ("registers", "spilled B", "stack B", "shared B", "CPU s"):
        table.add_column(heading, justify="right")
    try:
        items = census.work(architectures, options.quick, options.only)
        entries = list(census.compile_all(items, options.seconds))
    except KernelError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    for entry in entries:
        compiled, shared = entry.compiled, entry.source.shared_bytes
        table.add_row(
            entry.family,
            entry.source.name,
            entry.architecture,
            str(compiled.registers),
            str(compiled.spilled_bytes),
            str(compiled.stack_bytes),
            "at launch" if shared is None else str(shared),
            f"{compiled.seconds:.2f}",
            style="red" if entry.defect else None,
        )
    console.print(table)
    if options.record is not None:
        bring_up_to_date(options.record, entries)
    defects = [entry for entry in entries if entry.defect]
    for entry in defects:
        console.print(f"{entry.source.name} for {entry.architecture} {entry.defect}", style="red", markup=False)
    slowest = max((entry.compiled.seconds for entry in entries), default=0.0)
    console.print(f"{len(entries)} kernels, {len(defects)} with a defect; the slowest took {slowest:.2f} s")
    if left := len(items) - len(entries):
        console.print(f"{left} kernels were not compiled within {options.seconds:g} s: run it again")
    return 1 if defects or left or not entries else 0


if __name__ == "__main__":
    sys.exit(main())
