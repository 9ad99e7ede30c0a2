"""report.html: one file that shows a run, with every picture inside."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from training.attention import as_picture, attention_panels, shown_layers
from training.config import ReportConfig
from training.data import ImageData
from training.data.decode import in_mode
from training.data.images import UNREADABLE
from training.evaluation import Figures, summary_line
from training.files import write_text
from training.module import Classifier
from training.pictures import draw_calibration, draw_confusion, draw_curves, figure_uri, image_uri, read_curves

THUMBNAIL = 160


def write_report(
    folder: Path, module: Classifier, data: ImageData, figures: Figures, config: ReportConfig, split: str
) -> Path:
    """Write `folder`/report.html and return its path.

    Args:
        folder: of the run; its logs give the curves.
        module: holds the evaluated model and its predictions on `split`.
        figures: of those predictions.
    """
    curves = read_curves(folder)
    text = template("report.html.j2").render(
        title=module.description["model"]["name"],
        split=split,
        summary=summary_line(figures),
        figures=figures.summary,
        configuration=yaml.safe_dump(asdict(module.config), sort_keys=False),
        curves=figure_uri(draw_curves(curves)) if len(curves) else None,
        confusion=figure_uri(draw_confusion(figures.confusion)),
        calibration=figure_uri(draw_calibration(figures.calibration)),
        per_class=figures.per_class.reset_index().to_dict("records"),
        mistakes=mistakes(module, data, split, config.mistakes),
        attention=attention(module, data, split, config.attention_images),
    )
    path = folder / "report.html"
    write_text(path, text)
    return path


def template(name: str) -> Template:
    """A page of training/templates; every value is escaped, and a missing one is an error."""
    environment = Environment(
        loader=PackageLoader("training"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def thumbnail(picture: Image.Image) -> Image.Image:
    """The picture with its shorter side at a size that fits many in a row."""
    scale = THUMBNAIL / min(picture.size)
    return in_mode(picture, "RGB").resize((round(picture.width * scale), round(picture.height * scale)))


def mistakes(module: Classifier, data: ImageData, split: str, count: int) -> list[dict[str, Any]]:
    """The wrong answers with the highest loss: picture, label, true class, what the model said and how surely."""
    predictions, reader, classes = module.predictions, data.reader(split), module.classes
    entries = []
    for place in predictions.worst(count):
        index = int(predictions.index[place])
        entries.append(
            {
                "image": image_uri(thumbnail(reader.picture(index))),
                "label": reader.images.label(index),
                "true": classes[predictions.target[place]],
                "said": classes[predictions.best[place, 0]],
                "probability": float(predictions.probability[place, 0]),
                "loss": float(predictions.loss[place]),
            }
        )
    return entries


def attention(module: Classifier, data: ImageData, split: str, count: int) -> list[dict[str, Any]]:
    """Where the query in the middle looks, mean over the heads, in layers from first to last, drawn over images.

    Empty for a model without neighborhood attention.
    """
    if not shown_layers(module.model) or count == 0:
        return []
    reader = data.reader(split)
    entries = []
    for index in np.linspace(0, len(reader) - 1, min(count, len(reader)), dtype=int):
        try:
            image = reader.transform(reader.picture(int(index)))
        except UNREADABLE:
            continue
        picture = image_uri(thumbnail(as_picture(image, data.config)))
        panels = attention_panels(module.model, image[None], data.config)[0]
        drawn = [{"image": picture, "caption": reader.images.label(int(index))}, *panels]
        entries.append({"panels": drawn, "true": module.classes[reader.targets[int(index)]]})
    return entries
