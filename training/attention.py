"""Where a model looks, drawn over its images: the same panels in a run's report and in a gallery of predictions."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import models
from training.config import DataConfig
from training.pictures import image_uri, overlay

SHOWN_LAYERS = 4


def shown_layers(model: nn.Module) -> list[str]:
    """A few of the model's layers of neighborhood attention, from first to last; none where it has none."""
    layers = models.attention_layers(model)
    chosen = sorted({round(i) for i in np.linspace(0, len(layers) - 1, SHOWN_LAYERS)}) if layers else []
    return [layers[i] for i in chosen]


def as_picture(image: Tensor, data: DataConfig) -> Image.Image:
    """What the model sees as a picture: `image` [c, h, w] with its normalisation undone."""
    values = image.permute(1, 2, 0).cpu().numpy() * np.asarray(data.std) + np.asarray(data.mean)
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8).squeeze())


def attention_panels(model: nn.Module, images: Tensor, data: DataConfig) -> list[list[dict[str, str]]]:
    """For each of `images` [n, c, h, w], one panel per layer: where the query in the middle, ringed, looks; mean over
    the heads. A panel is `{"image": data URI, "caption": layer}`."""
    weight = next(model.parameters())
    panels: list[list[dict[str, str]]] = [[] for _ in images]
    for name in shown_layers(model):
        with torch.autocast(weight.device.type, enabled=False):
            maps = models.attention_maps(model, images.to(weight), name)[:, 0].mean(1).float().cpu().numpy()
        rows, columns = maps.shape[1:]
        query = ((rows // 2 + 0.5) / rows, (columns // 2 + 0.5) / columns)
        for image, weights, drawn in zip(images, maps, panels, strict=True):
            picture = overlay(as_picture(image, data), weights, [query])
            drawn.append({"image": image_uri(picture), "caption": name})
    return panels
