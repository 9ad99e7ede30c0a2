#!/usr/bin/env python3
"""Packs class folders of pictures into tar shards (webdataset) or Parquet (Hugging Face).

    python scripts/pack_shards.py photos packed                           # for train.py data=shards data.root=packed
    python scripts/pack_shards.py photos tables --layout parquet --check  # for train.py data=parquet data.root=tables

Files are copied as they are. Interrupted, it goes on where it stopped when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data.packing import pack
from training.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="ROOT/{train,val[,test]}/CLASS/IMAGE, or ROOT/CLASS/IMAGE, which is split")
    parser.add_argument("target", help="a folder to be made")
    parser.add_argument("--layout", choices=("tar", "parquet"), default="tar")
    parser.add_argument("--images-per-shard", type=int, default=1000, help="100 to 500 MB make a good shard")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--check", action="store_true", help="decode every picture; name and leave out the broken")
    options = parser.parse_args(arguments)
    if options.images_per_shard < 1 or options.workers < 1:
        parser.error("--images-per-shard and --workers must be 1 or more")
    try:
        done = pack(
            options.source,
            options.target,
            layout=options.layout,
            images_per_shard=options.images_per_shard,
            workers=options.workers,
            check=options.check,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    for line in done.broken:
        print(f"left out {line}")
    counts = ", ".join(f"{count} of {part}" for part, count in done.images.items())
    print(f"{options.target}: {counts}; {done.written} shards written, {done.kept} found, {len(done.broken)} left out")


if __name__ == "__main__":
    main()
