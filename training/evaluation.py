"""From predictions to figures: top-1, top-5, per class, confusion matrix, calibration; and their tables and files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from training.files import write_text

KEPT = 5  # classes kept for each image
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What a model answered: for each image its index in the split, true class, best classes with probabilities, loss.

    `index`, `target`, `loss`: [n]; `best`, `probability`: [n, min(5, classes)], best first.
    """

    index: np.ndarray
    target: np.ndarray
    best: np.ndarray
    probability: np.ndarray
    loss: np.ndarray

    @staticmethod
    def empty() -> "Predictions":
        """No image."""
        none = np.empty(0, np.int64)
        return Predictions(none, none, np.empty((0, 1), np.int64), np.empty((0, 1)), np.empty(0))

    @staticmethod
    def from_logits(logits: Tensor, target: Tensor, index: Tensor) -> "Predictions":
        """`logits` [n, classes], `target` and `index` [n]; images whose target is -1 are left out."""
        counted = target >= 0
        logits, target, index = logits[counted].float(), target[counted], index[counted]
        probability, best = logits.softmax(-1).topk(min(KEPT, logits.shape[-1]))
        loss = functional.cross_entropy(logits, target, reduction="none")
        return Predictions(*(part.cpu().numpy() for part in (index, target, best, probability, loss)))

    @staticmethod
    def gather(parts: list["Predictions"]) -> "Predictions":
        """All parts of all processes, sorted by index."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[list[Predictions]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(gathered, parts)
            parts = [part for process in gathered for part in process]
        if not parts:
            return Predictions.empty()
        fields = ("index", "target", "best", "probability", "loss")
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in fields]
        order = np.argsort(columns[0], kind="stable")
        return Predictions(*(column[order] for column in columns))

    def with_accepted(self, accepted: Sequence[Sequence[int]]) -> "Predictions":
        """The same answers where several classes can be right: `accepted` holds them for each image of the split.

        An image's target becomes the most probable of its accepted classes, so that every figure counts a hit on any.
        The loss stays that of the target before.
        """
        target = self.target.copy()
        for place, (index, best) in enumerate(zip(self.index, self.best, strict=True)):
            right = accepted[index]
            target[place] = next((guess for guess in best if guess in right), right[0])
        return replace(self, target=target)

    def worst(self, count: int) -> list[int]:
        """Places of the mistakes with the highest loss, worst first."""
        wrong = np.flatnonzero(self.best[:, 0] != self.target)
        return wrong[np.argsort(-self.loss[wrong], kind="stable")][:count].tolist()


@dataclass(frozen=True)
class Figures:
    """The evaluation of one model on one split. Fractions between 0 and 1; `top5` is None for five classes or fewer."""

    images: int
    top1: float
    top5: float | None
    loss: float
    calibration_error: float
    per_class: pd.DataFrame
    confusion: pd.DataFrame
    calibration: pd.DataFrame

    @property
    def summary(self) -> dict[str, float | int | None]:
        """The figures that are one number each."""
        return {
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
        }


def compute_figures(predictions: Predictions, classes: Sequence[str]) -> Figures:
    """Every figure from the predictions.

    Per class: images, recall (its own top-1), precision, F1. Confusion: rows true, columns predicted. Calibration
    error: expected calibration error over 15 bins of equal width (Guo et al., 2017); `calibration` has the bins.

    Raises:
        ValueError: there are no predictions.
    """
    count = len(predictions.target)
    if count == 0:
        raise ValueError("predictions: none, so there is nothing to evaluate")
    guess = predictions.best[:, 0]
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(matrix, (predictions.target, guess), 1)
    right, true, guessed = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    names = pd.Index(classes, name="class")
    per_class = pd.DataFrame(
        {
            "images": true,
            "recall": right / np.maximum(true, 1),
            "precision": right / np.maximum(guessed, 1),
            "f1": 2 * right / np.maximum(true + guessed, 1),
        },
        index=names,
    )
    hit = guess == predictions.target
    top5 = (predictions.best == predictions.target[:, None]).any(1).mean() if len(classes) > KEPT else None
    calibration = calibration_bins(predictions.probability[:, 0], hit)
    gaps = calibration["images"] * (calibration["accuracy"] - calibration["confidence"]).abs()
    return Figures(
        images=count,
        top1=float(hit.mean()),
        top5=None if top5 is None else float(top5),
        loss=float(predictions.loss.mean()),
        calibration_error=float(gaps.sum() / count),
        per_class=per_class,
        confusion=pd.DataFrame(matrix, index=names, columns=classes),
        calibration=calibration,
    )


def calibration_bins(confidence: np.ndarray, hit: np.ndarray) -> pd.DataFrame:
    """Bins of `confidence` of equal width: images in each, their mean confidence, and how many were right (0 to 1).

    An empty bin has zeros.
    """
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    images, sure, right = (np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, hit))
    edges = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
    filled = np.maximum(images, 1)
    return pd.DataFrame({"from": edges, "images": images, "confidence": sure / filled, "accuracy": right / filled})


def write_figures(figures: Figures, folder: Path) -> None:
    """metrics.json, per_class.csv, confusion.csv and calibration.csv in `folder`, each whole or not at all."""
    write_text(folder / "metrics.json", json.dumps(figures.summary, indent=2) + "\n")
    write_text(folder / "per_class.csv", figures.per_class.to_csv())
    write_text(folder / "confusion.csv", figures.confusion.to_csv())
    write_text(folder / "calibration.csv", figures.calibration.to_csv(index=False))


def figures_table(figures: Figures, title: str, rows: int = 20) -> Table:
    """The figures as a table for the terminal; of many classes, those with the lowest recall."""
    table = Table(title=title)
    for heading in ("class", "images", "recall", "precision", "F1"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    shown = figures.per_class
    if len(shown) > rows:
        shown = shown.sort_values("recall", kind="stable").head(rows)
        table.title = f"{title} (the {rows} classes with the lowest recall of {len(figures.per_class)})"
    for row in shown.itertuples():
        table.add_row(
            str(row.Index), str(row.images), *(f"{100 * v:.1f} %" for v in (row.recall, row.precision, row.f1))
        )
    return table


def summary_line(figures: Figures) -> str:
    """One line: top-1, top-5 where it means something, loss, number of images."""
    top5 = "" if figures.top5 is None else f", top-5 {100 * figures.top5:.2f} %"
    return f"top-1 {100 * figures.top1:.2f} %{top5}, loss {figures.loss:.4f}, {figures.images} images"
