#!/usr/bin/env python3
"""What a window, dilation and stride cost before anything runs: floors, tile waste, gain over dense attention.

    python scripts/simulate.py --space 256 256 --window 80 80 --heads 24 --head-dim 128
    python scripts/simulate.py --space 30 48 80 --window 18 24 24 --heads 24 --head-dim 128 --strides

Floors are those of benchmarks/floors.py; waste is (query, key) pairs multiplied per useful pair. With --against,
measured times of the same problems are put beside the floors.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import floors, summary
from benchmarks.cases import Case


def boxes(count: int, rank: int) -> list[tuple[int, ...]]:
    """Every box of `count` tokens whose sides are powers of two."""
    powers = [2**p for p in range(count.bit_length())]
    return [box for box in itertools.product(powers, repeat=rank) if math.prod(box) == count]


def best_tiles(case: Case, queries: int, keys: int) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """The least waste over all boxes of `queries` and `keys` tokens, and the boxes that have it."""
    problem = case.problem(torch.device("cpu"))
    rank = problem.rank
    return min((floors.tile_waste(problem, q, k), q, k) for q in boxes(queries, rank) for k in boxes(keys, rank))


def candidates(case: Case, strides: bool) -> list[Case]:
    """The case itself, and with every stride per axis that divides its window, if asked for."""
    if not strides:
        return [case]
    choices = [[s for s in (1, 2, 4, 8, 16, k) if s <= k] for k in case.window]
    return [
        case.replace(name=f"stride {'x'.join(map(str, s))}", stride=s) for s in sorted(set(itertools.product(*choices)))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", type=int, nargs="+", required=True)
    parser.add_argument("--window", type=int, nargs="+", required=True)
    parser.add_argument("--dilation", type=int, nargs="+", default=[])
    parser.add_argument("--stride", type=int, nargs="+", default=[])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", choices=sorted(floors.CEILINGS), default="NVIDIA H200")
    parser.add_argument("--query-tile", type=int, default=64, help="tokens of a query tile")
    parser.add_argument("--key-tile", type=int, default=64, help="tokens of a key tile")
    parser.add_argument("--strides", action="store_true", help="try strides, fastest first")
    parser.add_argument(
        "--against", type=Path, nargs="+", help="measured results (JSON lines) to put beside the floors"
    )
    options = parser.parse_args()
    rank = len(options.space)
    for name in ("window", "dilation", "stride"):
        given = getattr(options, name)
        if given and len(given) != rank:
            parser.error(f"--{name} {given}: needs one number for each of the {rank} axes of --space")
    case = Case(
        "as given", options.batch, tuple(options.space), options.heads, options.head_dim, tuple(options.window),
        tuple(options.dilation), tuple(options.stride), dtype=options.dtype,
    )  # fmt: skip
    for axis, (length, window, dilation, stride) in enumerate(
        zip(case.space, case.window, case.dilation, case.stride, strict=True)
    ):
        if not 1 <= stride <= window or window * dilation > length:
            parser.error(
                f"axis {axis}: window {window}, dilation {dilation}, stride {stride} on {length} tokens: "
                "needs 1 <= stride <= window and window * dilation <= length"
            )
    ceilings = floors.CEILINGS[options.device]
    dense = case.replace(window=case.space, dilation=(1,) * rank, stride=(1,) * rank).problem(torch.device("cpu"))
    dense_floor = floors.floor_seconds(dense, ceilings, "forward")
    measured = summary.load(options.against)[0] if options.against else None
    rows = []
    for candidate in candidates(case, options.strides):
        problem = candidate.problem(torch.device("cpu"))
        waste, query, key = best_tiles(candidate, options.query_tile, options.key_tile)
        memory = floors.forward_bytes(problem) / ceilings.bytes_per_second
        compute = floors.forward_flops(problem) / ceilings.flops_per_second[problem.dtype]
        attainable = max(memory, compute * waste)
        row = {
            "problem": candidate.name,
            "memory us": memory * 1e6,
            "matrix us": compute * 1e6,
            "waste": waste,
            "query tile": "x".join(map(str, query)),
            "key tile": "x".join(map(str, key)),
            "attainable us": attainable * 1e6,
            "over dense": dense_floor / attainable,
        }
        if measured is not None and len(measured):
            match = measured[
                (measured["key"] == candidate.key) & (measured["status"] == "ok") & (measured["direction"] == "forward")
            ]
            fused = match[match["method"] == "fused"]["seconds"]
            row["measured us"] = float(fused.iloc[-1]) * 1e6 if len(fused) else None
        rows.append(row)
    rows.sort(key=lambda row: row["attainable us"])
    table = Table(title=f"{options.device}, {options.dtype}: dense attention's floor {dense_floor * 1e6:.1f} us")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("problem", "query tile", "key tile") else "right")
    for row in rows:
        table.add_row(*(summary.format_number(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
