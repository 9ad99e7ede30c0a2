#!/usr/bin/env python3
"""What a window, dilation and stride cost before anything runs: floors, tile waste, gain over dense attention.

    python scripts/simulate.py --space 256 256 --window 80 80 --heads 24 --head-dim 128
    python scripts/simulate.py --space 30 48 80 --window 18 24 24 --heads 24 --head-dim 128 --strides
    python scripts/simulate.py --against results/nvidia-h200
    python scripts/simulate.py --model nat_tiny --batch 128 --against results/nvidia-h200

Floors are those of benchmarks/floors.py; waste is (query, key) pairs multiplied per useful pair. Without a problem,
every one that --against has measured is predicted; --model accounts for a whole model's forward pass by stage.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import account, floors, summary
from benchmarks.cases import DTYPES, Case


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
    """The case itself, or with every stride per axis that its window allows, if asked for."""
    if not strides:
        return [case]
    choices = [[s for s in (1, 2, 4, 8, 16, k) if s <= k] for k in case.window]
    return [
        case.replace(name=f"stride {'x'.join(map(str, s))}", stride=s) for s in sorted(set(itertools.product(*choices)))
    ]


def predict(case: Case, ceilings: floors.Ceilings, query_tile: int, key_tile: int) -> dict[str, Any]:
    """Floors of a forward pass, the waste of the best tiles, and what is attainable with them, in microseconds."""
    problem = case.problem(torch.device("cpu"))
    waste, query, key = best_tiles(case, query_tile, key_tile)
    memory = floors.forward_bytes(problem) / ceilings.bytes_per_second
    compute = floors.forward_flops(problem) / ceilings.flops_per_second[problem.dtype]
    whole = case.replace(window=case.space, dilation=(), stride=(), causal=()).problem(torch.device("cpu"))
    attainable = max(memory, compute * waste)
    return {
        "problem": case.name,
        "memory us": memory * 1e6,
        "matrix us": compute * 1e6,
        "waste": waste,
        "query tile": "x".join(map(str, query)),
        "key tile": "x".join(map(str, key)),
        "attainable us": attainable * 1e6,
        "over dense": floors.floor_seconds(whole, ceilings, "forward") / attainable,
    }


def measured_forward(paths: list[Path]) -> tuple[dict[str, float], dict[str, Case]]:
    """Microseconds of `fused` by the case's key, and the cases, from files or folders of results."""
    files = [file for path in paths for file in (sorted(path.glob("kernels-*.jsonl")) if path.is_dir() else [path])]
    frame, _ = summary.load(files)
    if frame.empty:
        return {}, {}
    chosen = frame[(frame["method"] == "fused") & (frame["direction"] == "forward") & (frame["status"] == "ok")]
    cases = {
        row["key"]: Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in row["case"].items()})
        for row in chosen.to_dict("records")
    }
    return {row["key"]: row["seconds"] * 1e6 for row in chosen.to_dict("records")}, cases


def one_case(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Case:
    """The problem that the command line describes; an impossible one ends the program."""
    rank = len(options.space)
    for name in ("window", "dilation", "stride"):
        given = getattr(options, name)
        if (given or name == "window") and len(given) != rank:
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
    return case


def show(title: str, frame: pd.DataFrame) -> None:
    table = Table(title=title)
    for column in frame.columns:
        table.add_column(str(column), justify="right" if pd.api.types.is_numeric_dtype(frame[column]) else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(summary.format_number(value) for value in row))
    Console().print(table)


def show_model(options: argparse.Namespace) -> None:
    ceilings = floors.CEILINGS[options.device]
    table = account.account(options.model, options.batch, DTYPES[options.dtype], ceilings)
    show(f"{options.model}, batch {options.batch}, {options.dtype}, {options.device}: by stage", table)
    kinds = table.groupby("kind", sort=False).sum(numeric_only=True).reset_index()
    show("by kind", kinds.sort_values("floor us", ascending=False))
    eager = table["floor us"].sum() / 1e6
    fused = account.fused_seconds(table, ceilings)
    print(f"floor of the forward pass: {eager * 1e3:.2f} ms, {options.batch / eager:,.0f} images/s;", end=" ")
    print(f"with residual and norm in one: {fused * 1e3:.2f} ms, {options.batch / fused:,.0f} images/s")
    for path in options.against or ():
        for row in summary.records(path / "models.jsonl" if path.is_dir() else path):
            same = [row.get(k) for k in ("model", "mode", "precision", "status")]
            if same == [options.model, "inference", options.dtype, "ok"] and row["batch_used"] == options.batch:
                share = row["images_per_second"] * eager / options.batch
                print(f"measured, {row['key']}: {row['images_per_second']:,.0f} images/s, {share:.0%} of the floor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", type=int, nargs="+")
    parser.add_argument("--window", type=int, nargs="+", default=[])
    parser.add_argument("--dilation", type=int, nargs="+", default=[])
    parser.add_argument("--stride", type=int, nargs="+", default=[])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", choices=sorted(floors.CEILINGS), default="NVIDIA H200")
    parser.add_argument("--query-tile", type=int, default=64, help="tokens of a query tile")
    parser.add_argument("--key-tile", type=int, default=64, help="tokens of a key tile")
    parser.add_argument("--strides", action="store_true", help="try strides, fastest first")
    parser.add_argument("--model", help="account for a model's forward pass instead: any timm name")
    parser.add_argument("--against", type=Path, nargs="+", help="measured results: files, or folders of them")
    options = parser.parse_args()
    if options.model:
        show_model(options)
        return
    times, cases = measured_forward(options.against or [])
    if options.space:
        chosen = candidates(one_case(options, parser), options.strides)
    elif cases:
        chosen = list(cases.values())
    else:
        parser.error("name a problem by --space and --window, a --model, or --against results that hold some")
    ceilings = floors.CEILINGS[options.device]
    table = pd.DataFrame([predict(case, ceilings, options.query_tile, options.key_tile) for case in chosen])
    if options.against:
        table["measured us"] = [times.get(case.key) for case in chosen]
        table["measured / attainable"] = table["measured us"] / table["attainable us"]
    if options.space:
        table = table.sort_values("attainable us")
    show(f"{options.device}, forward; `over dense`: dense attention's floor over what is attainable", table)
    if options.against and (ratios := table["measured / attainable"].dropna().tolist()):
        middle = statistics.median(ratios)
        print(f"{len(ratios)} measured: {min(ratios):.2f} to {max(ratios):.2f} times attainable, median {middle:.2f}")


if __name__ == "__main__":
    main()
