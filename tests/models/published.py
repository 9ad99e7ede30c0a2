"""What the published implementation is known by: the names and shapes of its files, and its answers.

Weights are made up from their names (`fill`), so that any implementation can rebuild them without the files.
`logits.npz` holds what the original answered for such weights and `image(1, 224)`.
"""

from __future__ import annotations

import json
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """Values for the parameter `key`, seeded by its name and scaled by its role, float32."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "rpb":
        values = 0.5 * values
    elif leaf.startswith("gamma"):
        values = 0.5 + 0.1 * values
    elif leaf == "bias":
        values = 0.1 * values
    elif len(shape) == 1:
        values = 1.0 + 0.1 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    return torch.from_numpy(values)


def image(batch: int, size: int) -> Tensor:
    """Standard normal images `[batch, 3, size, size]`, seeded by their size."""
    return torch.from_numpy(np.random.RandomState(size).standard_normal((batch, 3, size, size)).astype(np.float32))


@cache
def layouts() -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys and shapes of every published file; `hf_*` are the Hugging Face files.

    In the data a key with `{n}` stands for n keys, numbered from 0.
    """
    expanded: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, layout in json.loads((GOLDEN / "layouts.json").read_text()).items():
        expanded[name] = {}
        for key, shape in layout.items():
            repeated = re.search(r"\{(\d+)\}", key)
            for index in range(int(repeated[1]) if repeated else 1):
                expanded[name][re.sub(r"\{\d+\}", str(index), key)] = tuple(shape)
    return expanded


def state_dict(layout: str) -> dict[str, Tensor]:
    """A published file, with made-up values."""
    return {key: fill(key, shape) for key, shape in layouts()[layout].items()}


def logits() -> dict[str, Tensor]:
    """The original's answers `[1, 1000]` by layout."""
    with np.load(GOLDEN / "logits.npz") as answers:
        return {name: torch.from_numpy(answers[name]) for name in answers.files}
