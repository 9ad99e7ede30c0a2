#!/usr/bin/env python3
"""What a window, dilation and stride cost before anything runs: floors, tile waste, gain over dense attention.

    python scripts/simulate.py --space 256 256 --window 80 80 --heads 24 --head-dim 128
    python scripts/simulate.py --space 30 48 80 --window 18 24 24 --heads 24 --head-dim 128 --strides
    python scripts/simulate.py --space 56 56 --heads 2 --head-dim 32 --batch 128 --windows
    python scripts/simulate.py --against results/nvidia-h200
    python scripts/simulate.py --model nat_tiny --batch 128 --against results/nvidia-h200

Floors are those of benchmarks/floors.py; waste is (query, key) pairs multiplied per useful pair. Without a problem,
every one that --against has measured is predicted, and held against its measurement; --model accounts for a whole
model's forward pass by stage. The device is the one that --against was measured on, and an H200 without it.
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

from benchmarks import account, floors, summary
from benchmarks.cases import DTYPES, Case
from benchmarks.device import device_name
from benchmarks.terminal import console, show

WINDOWS = (3, 5, 7, 9, 11, 13, 16, 21, 24, 32, 48, 64, 80, 96, 128, 256, 512, 1024, 2048, 4096)
GPU_TILE = 64


def boxes(count: int, rank: int) -> list[tuple[int, ...]]:
    """Every box of `count` tokens whose sides are powers of two."""
    powers = [2**p for p in range(count.bit_length())]
    return [box for box in itertools.product(powers, repeat=rank) if math.prod(box) == count]


def best_tiles(case: Case, queries: int, keys: int) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """The least waste over all boxes of `queries` and `keys` tokens, and the boxes that have it."""
    problem = case.problem(torch.device("cpu"))
    rank = problem.rank
    return min((floors.tile_waste(problem, q, k), q, k) for q in boxes(queries, rank) for k in boxes(keys, rank))


def windows(case: Case) -> list[Case]:
    """The case with windows from 3 up to all that its shortest axis holds, the same on every axis."""
    longest = min(length // dilation for length, dilation in zip(case.space, case.dilation, strict=True))
    sizes = sorted({size for size in WINDOWS if size < longest} | {longest})
    return [case.replace(name=f"window {k}", window=(k,) * len(case.space)) for k in sizes]


def strides(case: Case) -> list[Case]:
    """The case with every stride per axis that its window allows, powers of two and the window itself."""
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


def measured_forward(frame: pd.DataFrame) -> tuple[dict[str, Case], pd.DataFrame]:
    """The cases by key, and microseconds by key and method, of the forward passes among records of kernels."""
    if frame.empty:
        return {}, pd.DataFrame()
    chosen = frame[(frame["direction"] == "forward") & (frame["status"] == "ok")]
    cases = {
        key: Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in case.items()})
        for key, case in zip(chosen["key"], chosen["case"], strict=True)
    }
    return cases, chosen.pivot_table(index="key", columns="method", values="seconds", aggfunc="last") * 1e6


def held_against(table: pd.DataFrame, keys: list[str], times: pd.DataFrame) -> pd.DataFrame:
    """`table` with what was measured beside what is predicted; `keys` are those of its rows."""
    there = times.reindex(keys).reset_index(drop=True)
    ours = next((there[method] for method in summary.CHOSEN if method in there), None)
    if ours is None:
        return table
    table = table.assign(**{"measured us": ours, "measured / attainable": ours / table["attainable us"]})
    if "dense" in there:
        table["measured over dense"] = there["dense"] / ours
    return table


def one_case(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Case:
    """The problem that the command line describes; an impossible one ends the program."""
    rank = len(options.space)
    options.window = options.window or [1] * (rank if options.windows else 0)
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


def chosen_device(options: argparse.Namespace, facts: list[dict[str, Any]]) -> tuple[str, floors.Ceilings, int]:
    """Name, ceilings and tile of the device asked for, or of the one that the results are from, or of an H200.

    The tile is the tokens of a matrix product's side; a CPU's loops go through each query's own window: one.
    """
    if options.device == "here":
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ceilings = floors.ceilings_of(here, [DTYPES[options.dtype]])
        return device_name(here), ceilings, GPU_TILE if here.type == "cuda" else 1
    if options.device is None and (stated := floors.ceilings_from(facts)):
        return facts[-1]["device"], stated, GPU_TILE if "cuda" in facts[-1] else 1
    name = options.device or "NVIDIA H200"
    return name, floors.CEILINGS[name], GPU_TILE


def show_model(options: argparse.Namespace, device: str, ceilings: floors.Ceilings) -> None:
    table = account.account(options.model, options.batch, DTYPES[options.dtype], ceilings)
    target = console()
    show(target, f"{options.model}, batch {options.batch}, {options.dtype}, {device}: by stage", table)
    kinds = table.groupby("kind", sort=False).sum(numeric_only=True).reset_index()
    show(target, "by kind", kinds.sort_values("floor us", ascending=False))
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
    parser.add_argument("--device", choices=[*sorted(floors.CEILINGS), "here"], help="`here` measures this machine's")
    parser.add_argument("--query-tile", type=int, help="tokens of a query tile (default: 64, on a CPU 1)")
    parser.add_argument("--key-tile", type=int, help="tokens of a key tile (default: 64, on a CPU 1)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--strides", action="store_true", help="try strides, fastest first")
    several.add_argument("--windows", action="store_true", help="try windows, up to all tokens")
    parser.add_argument("--model", help="account for a model's forward pass instead: any timm name")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="measured results: files, or folders")
    options = parser.parse_args()
    files = [f for path in options.against for f in (sorted(path.glob("kernels-*.jsonl")) if path.is_dir() else [path])]
    frame, facts = summary.load([file for file in files if file.name.startswith("kernels-")])
    device, ceilings, tile = chosen_device(options, facts)
    if DTYPES[options.dtype] not in ceilings.flops_per_second and (options.space or options.model):
        parser.error(f"--dtype {options.dtype}: the results hold no ceiling for it; --device here measures one")
    if options.model:
        show_model(options, device, ceilings)
        return
    cases, times = measured_forward(frame)
    if options.space:
        case = one_case(options, parser)
        chosen = strides(case) if options.strides else windows(case) if options.windows else [case]
    elif cases:
        chosen = list(cases.values())
    else:
        parser.error("name a problem by --space and --window, a --model, or --against results that hold some")
    rows = [predict(case, ceilings, options.query_tile or tile, options.key_tile or tile) for case in chosen]
    table = held_against(pd.DataFrame(rows), [case.key for case in chosen], times)
    ratios = table["measured / attainable"].dropna().tolist() if "measured / attainable" in table else []
    if options.space:
        table = table.sort_values("attainable us")
    show(console(), f"{device}, forward; `over dense`: dense attention's floor over what is attainable", table)
    if ratios:
        middle = statistics.median(ratios)
        print(f"{len(ratios)} measured: {min(ratios):.2f} to {max(ratios):.2f} times attainable, median {middle:.2f}")


if __name__ == "__main__":
    main()
