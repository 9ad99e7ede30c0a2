"""What a run of the GPU suite leaves behind: date, device, versions, counts and failures."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

PACKAGES = ("torch", "cupy-cuda13x", "cupy-cuda12x", "numpy", "timm", "pytest")
MESSAGE_LENGTH = 4000


@dataclass(frozen=True)
class Outcome:
    status: str
    """passed, failed or skipped."""
    message: str
    seconds: float
    details: str = ""
    """Of a failure: what pytest prints."""


@dataclass
class Record:
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def add(self, test: str, outcome: Outcome) -> None:
        self.outcomes[test] = outcome

    def summary(self) -> str:
        """Counts, the slowest tests, and the name of every failure with the first line of its message."""
        lines = [
            f"{name}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
            for name, counts in self._counts().items()
        ]
        slowest = sorted(self.outcomes.items(), key=lambda item: -item[1].seconds)[:5]
        lines += [f"slowest: {outcome.seconds:.1f} s {test}" for test, outcome in slowest]
        for test, outcome in self.outcomes.items():
            if outcome.status == "failed":
                lines.append(f"FAILED {test}: {outcome.message.strip().partition(chr(10))[0]}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        content = {
            "date": self.began.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self.began).total_seconds(), 1),
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "driver": _driver(),
            "versions": _versions(),
            "counts": self._counts(),
            "failures": self._messages("failed"),
            "skipped": self._messages("skipped"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")

    def _counts(self) -> dict[str, Counter[str]]:
        counts: dict[str, Counter[str]] = {}
        for test, outcome in self.outcomes.items():
            counts.setdefault(test.partition("::")[0], Counter())[outcome.status] += 1
        return counts

    def _messages(self, status: str) -> dict[str, str]:
        return {test: o.message[-MESSAGE_LENGTH:] for test, o in self.outcomes.items() if o.status == status}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
