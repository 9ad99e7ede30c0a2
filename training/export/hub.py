"""timm's format: safetensors, config.json and a model card, in a folder or on the Hugging Face hub.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it again, after `import models`. Everything is written by
timm's own functions.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme

from training.errors import CheckpointError, UserError, one_line
from training.files import make_folder, write_text
from training.inference.loading import Loaded, imagenet_classes

FILES = ("model.safetensors", "config.json", "README.md")
SOURCE = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
CITATIONS = {
    "nat": """@inproceedings{hassani2023neighborhood,
  title = {Neighborhood Attention Transformer},
  author = {Ali Hassani and Steven Walton and Jiachen Li and Shen Li and Humphrey Shi},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2023}
}""",
    "dinat": """@article{hassani2022dilated,
  title = {Dilated Neighborhood Attention Transformer},
  author = {Ali Hassani and Humphrey Shi},
  journal = {arXiv preprint arXiv:2209.15001},
  year = {2022}
}""",
}


def data_config(loaded: Loaded) -> dict[str, Any]:
    """The preprocessing in timm's words."""
    data = loaded.preprocessing
    return {
        "input_size": (data.in_chans, data.image_size, data.image_size),
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
        "mean": tuple(data.mean),
        "std": tuple(data.std),
    }


def model_config(loaded: Loaded, license_name: str) -> dict[str, Any]:
    """What goes into config.json besides what timm finds in the model: class names and licence."""
    described: dict[str, Any] = {"label_names": loaded.classes}
    if loaded.classes == imagenet_classes():
        described["label_descriptions"] = ImageNetInfo().label_descriptions(as_dict=True)
    trained_here = {"tag": "", "origin_url": ""} if loaded.run is not None else {}
    return {**described, "pretrained_cfg": {**trained_here, "license": license_name}}


def model_card(loaded: Loaded, name: str, license_name: str) -> dict[str, Any]:
    """What timm's `generate_readme` and `push_to_hf_hub` make a card of.

    A run's figures are read from the metrics.json that its evaluation left in its folder.
    """
    data = loaded.preprocessing
    weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    size = data.image_size
    stats: dict[str, str] = {"Params (M)": f"{weights / 1e6:.1f}", "Image size": f"{size} x {size} x {data.in_chans}"}
    shown = [loaded.readable(index) for index in range(min(len(loaded.classes), 20))]
    more = f", and {len(loaded.classes) - len(shown)} more" if len(shown) < len(loaded.classes) else ""
    details: dict[str, Any] = {
        "Model Type": "Image classification, neighborhood attention",
        "Architecture": loaded.name,
        "Model Stats": stats,
        "Classes": f"{len(loaded.classes)}: {', '.join(shown)}{more}",
    }
    figures = run_figures(loaded)
    if figures:
        details["Evaluation"] = figures
    details["Papers"] = [
        "Neighborhood Attention Transformer: https://arxiv.org/abs/2204.07143",
        "Dilated Neighborhood Attention Transformer: https://arxiv.org/abs/2209.15001",
    ]
    details["Original"] = SOURCE
    origin = "trained with fastna" if loaded.run is not None else "for use with fastna"
    usage = f"""```python
import models  # the fastna project: registers the architecture with timm
import timm

model = timm.create_model("hf-hub:{name}", pretrained=True).eval()  # or local-dir:FOLDER
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
probabilities = model(transform(image).unsqueeze(0)).softmax(-1)
names = model.pretrained_cfg["label_names"]
```"""
    return {
        "tags": ["image-classification", "timm", "neighborhood-attention"],
        "license": license_name,
        "description": f"{loaded.name} with {len(loaded.classes)} classes, {origin}.",
        "details": details,
        "usage": usage,
        "citation": list(CITATIONS.values()) if loaded.name.startswith("dinat") else CITATIONS["nat"],
    }


def run_figures(loaded: Loaded) -> dict[str, str]:
    """Top-1 and the like of the run that a checkpoint belongs to; nothing where it was never evaluated."""
    if loaded.run is None:
        return {}
    path = loaded.run.path.parent.parent / "metrics.json"
    if not path.is_file():
        return {}
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        found = {"Top-1": figures["top1"], "Top-5": figures["top5"]}
        percent = {name: f"{100 * value:.2f} %" for name, value in found.items() if value is not None}
        return {**percent, "Images": str(figures["images"]), "Data": loaded.preprocessing.name}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the figures of an evaluation ({error!r}); run eval.py again") from error


def save_folder(loaded: Loaded, folder: Path, license_name: str) -> list[Path]:
    """Write FILES into `folder`, each whole or not at all; returns their paths."""
    make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside:
        save_for_hf(
            loaded.model,
            aside,
            model_config=model_config(loaded, license_name),
            model_args=loaded.arguments,
            data_config=data_config(loaded),
            safe_serialization=True,
        )
        card = model_card(loaded, f"USER/{folder.resolve().name}", license_name)
        write_text(Path(aside) / "README.md", generate_readme(card, folder.resolve().name))
        for name in FILES:
            shutil.move(Path(aside) / name, folder / name)
    return [folder / name for name in FILES]


def push_to_hub(loaded: Loaded, repository: str, license_name: str, private: bool) -> str:
    """Upload weights, configuration and card to `repository` (USER/NAME) and return its address.

    The token is Hugging Face's own affair: `hf auth login`, or HF_TOKEN.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    try:
        done = push_to_hf_hub(
            loaded.model,
            repository,
            private=private,
            model_config=model_config(loaded, license_name),
            model_card=model_card(loaded, repository, license_name),
            model_args=loaded.arguments,
            data_config=data_config(loaded),
            safe_serialization=True,
        )
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError; an impossible name is a ValueError
        raise UserError(f"--push {repository}: {one_line(str(error)) or type(error).__name__}") from error
    return str(done)
