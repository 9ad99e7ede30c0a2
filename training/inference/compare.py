"""Two models on the same images: how often they agree, which is better, where they differ, and whether it is chance."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from torch.utils.data import DataLoader

from training.data.images import Broken, ImageReader, Images, collate
from training.data.sampling import EvalBatches
from training.data.transforms import eval_transform
from training.errors import CheckpointError, DataError
from training.evaluation import Predictions, compute_figures
from training.files import write_text
from training.inference.loading import Loaded
from training.inference.predict import Runner
from training.pictures import image_uri
from training.report import template, thumbnail

SHOWN = 60  # differing images on the page


def answer(
    runner: Runner, images: Images, batch_size: int, workers: int, advance: Callable[[int], None]
) -> tuple[Predictions, list[Broken]]:
    """What a model says of every image, and which images could not be read."""
    data = runner.loaded.preprocessing
    reader = ImageReader(images, eval_transform(data), data.in_chans)
    batches = EvalBatches(len(reader), batch_size)
    parts: list[Predictions] = []
    broken: list[Broken] = []
    for batch in DataLoader(reader, batch_sampler=batches, collate_fn=collate, num_workers=workers):
        broken += batch.broken
        if len(batch.target):
            parts.append(Predictions.from_logits(runner.logits(batch.image).cpu(), batch.target, batch.index))
        advance(len(batch.target) + len(batch.broken))
    return Predictions.gather(parts), broken


@dataclass(frozen=True)
class Comparison:
    """`both`, `only_first`, `only_second`, `neither`: images that these models classify correctly.

    `p_value`: McNemar's test in its exact form (the two-sided binomial test of `only_first` against `only_second`);
    the probability of so large a difference between two equally good models. `per_class`: recall of each and the
    difference, second - first. `differences`: the images of unequal answers, those that only one has right first.
    """

    names: tuple[str, str]
    both: int
    only_first: int
    only_second: int
    neither: int
    agreement: float
    p_value: float
    per_class: pd.DataFrame
    differences: pd.DataFrame

    @property
    def images(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def summary(self) -> dict[str, object]:
        """The figures that are one number each."""
        return {
            "first": self.names[0],
            "second": self.names[1],
            "images": self.images,
            "top1_first": (self.both + self.only_first) / self.images,
            "top1_second": (self.both + self.only_second) / self.images,
            "agreement": self.agreement,
            "both_right": self.both,
            "only_first_right": self.only_first,
            "only_second_right": self.only_second,
            "neither_right": self.neither,
            "mcnemar_p_value": self.p_value,
        }


def require_same_classes(first: Loaded, second: Loaded) -> None:
    """Whether two models can be compared at all.

    Raises:
        CheckpointError: the models have different classes.
    """
    classes = first.classes
    if classes != second.classes:
        raise CheckpointError(
            f"{first.source} has {len(classes)} classes, {second.source} {len(second.classes)};"
            " two models can be compared only where their classes are the same in the same order"
        )


def compare(first: Loaded, second: Loaded, answers: tuple[Predictions, Predictions], images: Images) -> Comparison:
    """Compare what both models said of the images that both could read.

    Raises:
        CheckpointError: the models have different classes.
        DataError: there is no image to compare on.
    """
    require_same_classes(first, second)
    classes = first.classes
    one, two = answers
    if len(one.target) == 0:
        raise DataError("there is no readable image to compare on")
    guesses = np.stack([one.best[:, 0], two.best[:, 0]])
    right = guesses == one.target
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    discordant = only_first + only_second
    recalls = [compute_figures(predictions, classes).per_class for predictions in answers]
    per_class = pd.DataFrame(
        {"images": recalls[0]["images"], "first": recalls[0]["recall"], "second": recalls[1]["recall"]}
    )
    per_class["difference"] = per_class["second"] - per_class["first"]
    unequal = np.flatnonzero(guesses[0] != guesses[1])
    names = np.asarray(classes, dtype=object)
    differences = pd.DataFrame(
        {
            "index": one.index[unequal],
            "image": [images.label(int(index)) for index in one.index[unequal]],
            "class": names[one.target[unequal]],
            "first": names[guesses[0, unequal]],
            "first_probability": one.probability[unequal, 0],
            "second": names[guesses[1, unequal]],
            "second_probability": two.probability[unequal, 0],
            "right": np.select([right[0, unequal], right[1, unequal]], ["first", "second"], "neither"),
        }
    )
    order = {"first": 0, "second": 1, "neither": 2}
    return Comparison(
        names=(first.source, second.source),
        both=int(right.all(0).sum()),
        only_first=only_first,
        only_second=only_second,
        neither=int((~right).all(0).sum()),
        agreement=float((guesses[0] == guesses[1]).mean()),
        p_value=float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        per_class=per_class,
        differences=differences.sort_values("right", key=lambda column: column.map(order), kind="stable"),
    )


def write_comparison(comparison: Comparison, images: Images, folder: Path) -> Path:
    """comparison.json, per_class.csv, differences.csv and comparison.html in `folder`; returns the page's path."""
    write_text(folder / "comparison.json", json.dumps(comparison.summary, indent=2) + "\n")
    write_text(folder / "per_class.csv", comparison.per_class.to_csv())
    write_text(folder / "differences.csv", comparison.differences.drop(columns="index").to_csv(index=False))
    shown = comparison.differences.head(SHOWN).to_dict("records")
    page = template("comparison.html.j2").render(
        summary=comparison.summary,
        per_class=comparison.per_class.sort_values("difference", kind="stable").reset_index().to_dict("records"),
        differing=len(comparison.differences),
        entries=[{**entry, "picture": image_uri(thumbnail(images.load(entry["index"])))} for entry in shown],
    )
    path = folder / "comparison.html"
    write_text(path, page)
    return path
