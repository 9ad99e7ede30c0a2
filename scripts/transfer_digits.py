"""Does fine-tuning beat training from scratch? Pretrain on the digits 0-4, then learn 5-9 from 40 drawings, both ways.

python scripts/transfer_digits.py [--seeds 3] [--output results/transfer_digits.json] [key=value ...]

Every run is a `python train.py experiment=...` of its own; further overrides go to all of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent


def train(folder: Path, experiment: str, seed: int, *overrides: str) -> Path:
    """One run in a folder of its own; returns the folder."""
    command = [sys.executable, "train.py", f"experiment={experiment}", f"output_dir={folder}", f"seed={seed}"]
    subprocess.run([*command, "logger=csv", *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def top1(run: Path) -> float:
    """Test accuracy that a run wrote."""
    return json.loads((run / "metrics.json").read_text())["top1"]


def compare(folder: Path, seed: int, overrides: list[str]) -> dict[str, float]:
    """Test accuracy on the digits 5-9 with and without the weights learnt on 0-4."""
    weights = train(folder / "pretrain", "digits_pretrain", seed, *overrides) / "checkpoints" / "best.ckpt"
    scratch = train(folder / "scratch", "digits_transfer", seed, "model.head_warmup_epochs=0", *overrides)
    tuned = train(folder / "tuned", "digits_transfer", seed, f"model.checkpoint={weights}", *overrides)
    return {"from_scratch": top1(scratch), "fine_tuned": top1(tuned)}


def main() -> None:
    """Compare over some seeds; print the means and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of comparisons (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments, overrides = parser.parse_known_args()
    runs = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(compare(Path(folder), seed, overrides))
    means = {key: round(mean(run[key] for run in runs), 4) for key in runs[0]}
    print(", ".join(f"{key.replace('_', ' ')} {100 * value:.1f} %" for key, value in means.items()))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        text = {"task": "digits 5-9 from 40 drawings, test top-1", "mean": means, "seeds": runs}
        arguments.output.write_text(json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    main()
