"""Whether gradients must be the same bits every time; they are, unless somebody allows otherwise."""

from __future__ import annotations

import torch

_required = True


def set_deterministic(required: bool) -> None:
    """Allow (`False`) or forbid, in this whole process, faster gradients whose last bits may differ from run to run.

    Read when a backward pass runs, in whatever thread; a compiled function obeys it too, a captured CUDA graph keeps
    what was set when it was captured. While `torch.use_deterministic_algorithms(True)` is in force, it has no effect.
    Today it concerns large windows on Hopper; `explain` says whether a call is concerned.
    """
    global _required
    _required = required


def is_deterministic() -> bool:
    """Whether the same call must give the same gradients to the last bit: `set_deterministic`, or PyTorch's switch."""
    return _required or torch.are_deterministic_algorithms_enabled()
