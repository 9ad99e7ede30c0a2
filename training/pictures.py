"""Pictures of a report, each as a data URI, so that one file holds them all."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from training.data.decode import in_mode

LABELLED_CLASSES = 25  # beyond that, numbers and names in a confusion matrix are too small to read
CURVES = {
    "Loss": ("train/loss_epoch", "val/loss", "val_ema/loss"),
    "Top-1": ("val/top1", "val_ema/top1"),
    "Learning rate": ("rate",),
    "Images per second": ("images_per_second",),
}


def image_uri(image: Image.Image) -> str:
    """A PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_uri(figure: Figure) -> str:
    """An SVG: sharp at any zoom. Without a date, so that equal runs give equal files."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastna"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_curves(folder: Path) -> pd.DataFrame:
    """Every logged metric by step, over all starts of the run; what a resumed start logged again replaces the old."""
    history = pd.DataFrame()
    starts = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in starts:
        rows = pd.read_csv(path)
        if not history.empty and not rows.empty:
            history = history[history["step"] < rows["step"].min()]
        history = pd.concat([history, rows], ignore_index=True)
    return history


def draw_curves(history: pd.DataFrame) -> Figure:
    """Loss, top-1, learning rate and images/s over the steps."""
    shown = {title: [key for key in keys if key in history] for title, keys in CURVES.items()}
    shown = {title: keys for title, keys in shown.items() if keys}
    figure = Figure(figsize=(11, 3 * -(-len(shown) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).ravel()
    for axis, (title, keys) in zip(axes, shown.items(), strict=False):
        for key in keys:
            values = history[["step", key]].dropna()
            axis.plot(values["step"], values[key], label=key, linewidth=1.5)
        _finish(axis, title)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return figure


def _finish(axis: Axes, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend()


def draw_confusion(confusion: pd.DataFrame) -> Figure:
    """Rows true, columns predicted; each row as shares of its class, with the counts where there is room."""
    counts = confusion.to_numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labelled = len(counts) <= LABELLED_CLASSES
    side = min(4 + 0.35 * len(counts), 11) if labelled else 8
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if labelled:
        axis.set_xticks(range(len(counts)), confusion.columns, rotation=45, ha="right")
        axis.set_yticks(range(len(counts)), confusion.index)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def draw_calibration(bins: pd.DataFrame) -> Figure:
    """Accuracy over confidence (a reliability diagram): bars on the diagonal are calibrated; width by images."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    step = 1 / len(bins)
    share = bins["images"] / max(bins["images"].max(), 1)
    axis.bar(bins["from"] + step / 2, bins["accuracy"], step * (0.25 + 0.7 * share), label="accuracy")
    axis.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share that was right")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def overlay(picture: Image.Image, weights: np.ndarray, marked: Sequence[tuple[float, float]] = ()) -> Image.Image:
    """`weights` [rows, columns] as colour over `picture`; `marked` are (row, column) fractions to ring."""
    side = 160
    scale = side / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    base = np.asarray(in_mode(picture, "RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    heat = weights / max(float(weights.max()), 1e-12)
    heat_image = Image.fromarray((255 * heat).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    strength = np.asarray(heat_image, np.float32)[..., None] / 255
    colour = matplotlib.colormaps["inferno"](strength[..., 0])[..., :3] * 255
    blended = base * (1 - 0.75 * strength) + colour * 0.75 * strength
    rows, columns = np.mgrid[: size[1], : size[0]]
    for row, column in marked:
        distance = np.hypot(rows - row * size[1], columns - column * size[0])
        blended[(distance > 4) & (distance < 6.5)] = (0, 220, 255)
    return Image.fromarray(blended.clip(0, 255).astype(np.uint8))
