"""torch.export and ONNX: programs that need nothing of this project, for any batch size.

Neighborhood attention is recorded as PyTorch's own functions (`kernels.decomposed`). Class names and preprocessing
travel inside: in a .pt2 as the extra file `fastna.json`, in an .onnx as the metadata of the same keys.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import kernels
from training.errors import ConfigError, UserError
from training.files import written_aside
from training.inference.loading import Loaded

EXTRA = "fastna.json"
TOLERANCE = 1e-4  # of the largest logit
CHECKED_BATCHES = (1, 3)
PREPROCESSING = ("image_size", "in_chans", "interpolation", "crop_pct", "mean", "std")


class ExportError(UserError):
    """An exported program does not compute what the model does."""


def description(loaded: Loaded) -> dict[str, Any]:
    """Architecture, class names and preprocessing, as plain containers."""
    data = dataclasses.asdict(loaded.preprocessing)
    return {
        "architecture": loaded.name,
        "classes": loaded.classes,
        "preprocessing": {key: data[key] for key in PREPROCESSING},
    }


def example(loaded: Loaded, batch: int) -> Tensor:
    """Random images `[batch, c, h, w]`, always the same."""
    data = loaded.preprocessing
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, data.in_chans, data.image_size, data.image_size, generator=generator)


def trace(loaded: Loaded) -> ExportedProgram:
    """The model as a program of PyTorch's own functions, for images of its size in batches of any size."""
    model = loaded.model.cpu().float()
    with kernels.decomposed(), torch.no_grad():
        return torch.export.export(model, (example(loaded, 2),), dynamic_shapes=({0: Dim("batch")},))


def write_program(loaded: Loaded, program: ExportedProgram, path: Path) -> float:
    """Write a .pt2 file that `torch.export.load` opens; returns its largest error relative to the largest logit.

    Raises:
        ExportError: it does not answer as the model does.
    """
    with written_aside(path) as aside:
        renamed = aside.with_suffix(".pt2")  # torch.export.save warns of any other suffix
        torch.export.save(program, renamed, extra_files={EXTRA: json.dumps(description(loaded))})
        renamed.rename(aside)
        with aside.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch about its own buffer, which nobody writes to
            read = torch.export.load(file).module()
        return largest_error(loaded, path, lambda images: read(images).numpy())


def write_onnx(loaded: Loaded, program: ExportedProgram, path: Path) -> float:
    """Write an .onnx file with input `image` and output `logits`; returns what onnxruntime's largest error is.

    Raises:
        ExportError: onnxruntime does not answer as the model does.
        ConfigError: onnx, onnxscript or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch.onnx writes with)
    except ImportError as error:
        raise ConfigError(f'--format onnx: {error}; pip install "fastna[export]"') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about its own treespec
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),  # the axis' name in the file; a program alone calls it s77
        )
    assert made is not None
    with written_aside(path) as aside:
        proto = made.model_proto
        for key, value in description(loaded).items():
            proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
        onnx.checker.check_model(proto)
        onnx.save(proto, aside)
        session = onnxruntime.InferenceSession(aside, providers=["CPUExecutionProvider"])
        return largest_error(loaded, path, lambda images: session.run(None, {"image": images.numpy()})[0])


def largest_error(loaded: Loaded, path: Path, answer: Any) -> float:
    """The largest difference between `answer` and the model over several batch sizes, as a share of the largest logit.

    Raises:
        ExportError: it is above TOLERANCE, or not a number.
    """
    worst = 0.0
    for batch in CHECKED_BATCHES:
        images = example(loaded, batch)
        with torch.inference_mode():
            expected = loaded.model(images).numpy()
        found = answer(images)
        if found.shape != expected.shape:
            raise ExportError(f"{path}: answers {found.shape} for a batch of {batch}, the model {expected.shape}")
        error = np.abs(found - expected).max() / np.abs(expected).max()
        if not error <= TOLERANCE:
            raise ExportError(f"{path}: differs from the model by {error:.1e}, more than {TOLERANCE:.0e}; not written")
        worst = max(worst, float(error))
    return worst
