"""From images to their most probable classes, and to files of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.transforms import eval_transform
from training.errors import ConfigError
from training.files import write_text, written_aside
from training.inference.loading import Loaded
from training.inference.sources import Item, SourceImages

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TABLES = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image: the best classes, most probable first; or why the image could not be read."""

    place: tuple[int, int]
    label: str
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


class Runner:
    """Runs a model in one place and precision.

    Raises:
        ConfigError: this machine has no such device.
    """

    def __init__(self, loaded: Loaded, device: str, precision: str) -> None:
        self.loaded = loaded
        self.autocast = PRECISIONS[precision]
        try:
            self.device = torch.device(device)
            self.model = loaded.model.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """`[n, classes]` float32, on the model's device, of `images` `[n, c, h, w]`."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model(images.to(self.device)).float()


def predict(
    runner: Runner,
    sources: list[Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    workers: int = 0,
    watch: Callable[[list[Item]], None] = lambda items: None,
) -> Iterator[Prediction]:
    """Predictions as they come, unreadable images among them; sort by `place` for the order of the sources.

    Args:
        watch: sees every batch of items before it is dropped.
    """
    loaded = runner.loaded
    top = min(top, len(loaded.classes))
    images = SourceImages(sources, eval_transform(loaded.preprocessing), loaded.preprocessing.in_chans)
    for items in DataLoader(images, batch_size, num_workers=workers, collate_fn=list):
        watch(items)
        tensors = [item.image for item in items if item.image is not None]
        best: Iterator[tuple[list[float], list[int]]] = iter(())
        if tensors:
            probability, index = runner.logits(torch.stack(tensors)).softmax(-1).topk(top)
            best = zip(probability.tolist(), index.tolist(), strict=True)
        for item in items:
            if item.image is None:
                yield Prediction(item.place, item.label, error=item.error)
            else:
                probabilities, classes = next(best)
                yield Prediction(item.place, item.label, tuple(classes), tuple(probabilities))


def table(predictions: list[Prediction], loaded: Loaded) -> pd.DataFrame:
    """One row for each image: image, class_1, probability_1, class_2, ...; `error` where it could not be read."""
    top = max((len(prediction.classes) for prediction in predictions), default=0)
    rows = []
    for prediction in predictions:
        row: dict[str, object] = {"image": prediction.label}
        for rank in range(top):
            known = rank < len(prediction.classes)
            row[f"class_{rank + 1}"] = loaded.classes[prediction.classes[rank]] if known else None
            row[f"probability_{rank + 1}"] = prediction.probabilities[rank] if known else None
        rows.append(row | {"error": prediction.error})
    return pd.DataFrame(rows)


def records(predictions: list[Prediction], loaded: Loaded) -> list[dict[str, object]]:
    """One record for each image: its name, and its predictions or its error."""
    return [
        {"image": p.label, "error": p.error}
        if p.error is not None
        else {
            "image": p.label,
            "predictions": [
                {"class": loaded.classes[index], "probability": probability}
                for index, probability in zip(p.classes, p.probabilities, strict=True)
            ],
        }
        for p in predictions
    ]


def write_table(path: Path, predictions: list[Prediction], loaded: Loaded) -> None:
    """Write predictions as `path`'s suffix says: .csv, .json or .parquet; whole or not at all.

    Raises:
        ConfigError: Parquet without pyarrow.
    """
    match path.suffix:
        case ".json":
            write_text(path, json.dumps(records(predictions, loaded), indent=1) + "\n")
        case ".csv":
            write_text(path, table(predictions, loaded).to_csv(index=False))
        case ".parquet":
            try:
                with written_aside(path) as aside:
                    table(predictions, loaded).to_parquet(aside, index=False)
            except ImportError as error:
                raise ConfigError(f"--output {path}: needs pyarrow; pip install pyarrow") from error
