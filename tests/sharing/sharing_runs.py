"""Command lines of the scripts in this process, and files that would run code if they were unpickled."""

import contextlib
import importlib.util
import io
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


class Done:
    """How a command ended: `code`, 0 for success or what it passed to exit; what it printed."""

    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one line that a refused command ends with."""
        text = self.code if isinstance(self.code, str) else self.err.strip().splitlines()[-1]
        assert text.startswith("error: "), text
        assert "\n" not in text
        return text


def run(script: str, *arguments: object, check: bool = True, folder: Path = ROOT) -> Done:
    """`python SCRIPT ARGUMENTS` in `folder`, without the seconds that a new process takes to start."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.path.copy(), os.getcwd())
    code: Any = 0
    sys.argv = [script, *map(str, arguments)]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        sys.argv, sys.path[:] = before[0], before[1]
        os.chdir(before[2])
    if check and code:
        pytest.fail(f"{script} {arguments} ended with {code!r}:\n{out.getvalue()}\n{err.getvalue()}")
    return Done(code, out.getvalue(), err.getvalue())


class Malicious:
    """Unpickled without care, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def write_malicious(path: Path, proof: Path) -> None:
    """A checkpoint of the right shape for which `torch.load(weights_only=False)` would make the folder `proof`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "fastna": Malicious(proof)}, path)


has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
