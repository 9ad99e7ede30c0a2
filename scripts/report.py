#!/usr/bin/env python3
"""Makes one self-contained HTML report, and Markdown tables, from results of the benchmarks.

python scripts/report.py results/nvidia-h200
python scripts/report.py results/nvidia-h200 --against results-before/nvidia-h200
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report, summary
from benchmarks.device import ROOT


def files(paths: list[Path]) -> list[Path]:
    """The JSON-lines files that are named, or that lie in a folder that is."""
    found: list[Path] = []
    for path in paths:
        found += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        sys.exit(f"results {', '.join(missing)}: not there; name a file or folder that scripts/benchmark_*.py wrote")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="JSON-lines files, or folders of them")
    parser.add_argument("--against", type=Path, nargs="+", help="earlier results to compare with")
    parser.add_argument("--html", type=Path, help="where to write the report (default: report.html beside the results)")
    parser.add_argument("--readme", action="store_true", help="make the tables that README.md and docs/ mark anew")
    options = parser.parse_args()
    if bool(options.results) == options.readme:
        parser.error("name results, or say --readme")
    if options.readme:
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
            page.write_text(report.fill_marked_tables(page.read_text(), ROOT))
        return
    try:
        html = report.build(files(options.results), files(options.against) if options.against else None)
    except ValueError as error:
        sys.exit(str(error))
    first = options.results[0]
    target = options.html or (first if first.is_dir() else first.parent) / "report.html"
    target.write_text(html)
    for title, table in report.tables(files(options.results)).items():
        print(f"### {title}\n\n{summary.markdown(table)}\n")
    print(f"report: {target}")


if __name__ == "__main__":
    main()
