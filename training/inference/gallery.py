"""gallery.html: one file that shows predictions, each image with its best classes and where the model looked."""

from pathlib import Path
from typing import Any

import torch

from training.attention import as_picture, attention_panels
from training.files import write_text
from training.inference.loading import Loaded
from training.inference.predict import Prediction, Runner
from training.inference.sources import Item
from training.pictures import image_uri
from training.report import template, thumbnail

AT_ONCE = 16  # images whose attention is computed together


class Gallery:
    """Keeps what the first `limit` images looked like while predictions run, and draws them afterwards."""

    def __init__(self, runner: Runner, limit: int) -> None:
        self.runner, self.limit = runner, limit
        self._items: list[Item] = []

    def watch(self, items: list[Item]) -> None:
        """Keep the images of a batch as long as there is room."""
        room = self.limit - len(self._items)
        self._items += [item for item in items if item.image is not None][:room]

    def write(self, path: Path, predictions: list[Prediction]) -> None:
        """Write the page: the images kept, and every image that could not be read."""
        loaded = self.runner.loaded
        by_place = {prediction.place: prediction for prediction in predictions}
        unreadable = [prediction for prediction in predictions if prediction.error is not None]
        items = sorted(self._items, key=lambda item: item.place)
        text = template("gallery.html.j2").render(
            title=loaded.name,
            source=loaded.source,
            readable=len(predictions) - len(unreadable),
            unreadable=[{"label": prediction.label, "error": prediction.error} for prediction in unreadable],
            entries=[
                _entry(item, by_place[item.place], panels, loaded)
                for item, panels in zip(items, self._panels(items), strict=True)
            ],
        )
        write_text(path, text)

    def _panels(self, items: list[Item]) -> list[list[dict[str, str]]]:
        panels: list[list[dict[str, str]]] = []
        for start in range(0, len(items), AT_ONCE):
            images = torch.stack([item.image for item in items[start : start + AT_ONCE] if item.image is not None])
            panels += attention_panels(self.runner.model, images, self.runner.loaded.preprocessing)
        return panels


def _entry(item: Item, prediction: Prediction, panels: list[dict[str, str]], loaded: Loaded) -> dict[str, Any]:
    assert item.image is not None
    return {
        "label": item.label,
        "image": image_uri(thumbnail(as_picture(item.image, loaded.preprocessing))),
        "bars": [
            {"name": loaded.readable(index), "title": loaded.classes[index], "probability": probability}
            for index, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        ],
        "panels": panels,
    }
