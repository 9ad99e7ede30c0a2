"""Train a classifier: python train.py experiment=digits [key=value ...]. See docs/training.md and configs/."""

from omegaconf import DictConfig

from training.cli import run_command
from training.config import TrainConfig, to_object


def main(config: DictConfig) -> None:
    """One run of a composed configuration."""
    parsed = to_object(config, TrainConfig)
    from training.run import train

    train(parsed)


if __name__ == "__main__":
    run_command("train", main)
