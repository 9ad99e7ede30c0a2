"""Evaluate a checkpoint: python eval.py ckpt=PATH [data=...] [key=value ...]. See docs/training.md."""

from omegaconf import DictConfig

from training.cli import run_command
from training.config import EvalConfig, to_object


def main(config: DictConfig) -> None:
    """One evaluation of a composed configuration."""
    parsed = to_object(config, EvalConfig)
    from training.run import evaluate

    evaluate(parsed)


if __name__ == "__main__":
    run_command("eval", main)
