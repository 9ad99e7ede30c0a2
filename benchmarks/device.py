"""What a measurement was taken on: device, driver, versions, clocks, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def device_name(device: torch.device) -> str:
    """The device's name as a person would say it: `NVIDIA H200`, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_fact("model name") or platform.processor() or platform.machine()


def _processor_fact(name: str, unit: str = "") -> str:
    """What Linux says of the first core under `name`; nothing elsewhere."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith(name):
            return f"{line.split(':', 1)[1].strip()} {unit}".strip()
    return ""


def commit() -> str:
    """The commit measured, `-dirty` behind it where more than results differs; without git, what FASTNA_COMMIT says."""
    if stated := os.environ.get("FASTNA_COMMIT"):
        return stated
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/results")
    return _output("git", "rev-parse", "--short", "HEAD") + ("-dirty" if changed not in ("", "unknown") else "")


def _clocks(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power and temperature while the device is busy: at rest its clocks say nothing."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    torch.cuda._sleep(2 * 10**9)  # about a second, while nvidia-smi looks
    index = torch.cuda.current_device() if device.index is None else device.index
    chosen = f"--id={torch.cuda.get_device_properties(index).uuid}"
    facts = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", chosen)
    if facts == "unknown":  # the identifier is of another form inside some containers
        facts = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={index}")
    torch.cuda.synchronize(device)
    return {f"nvidia-smi {query}": facts}


def describe(device: torch.device) -> dict[str, str]:
    """Facts that a reader needs to judge or repeat a measurement, as plain strings."""
    facts = {
        "device": device_name(device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cupy": next((v for v in map(_version, ("cupy-cuda13x", "cupy-cuda12x")) if v != "absent"), "absent"),
        "timm": _version("timm"),
        "natten": _version("natten"),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        return facts | _clocks(device) | {"cuda": str(torch.version.cuda)}
    return facts | {"instructions": torch.backends.cpu.get_cpu_capability(), "clock": _processor_fact("cpu MHz", "MHz")}


def out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out: a GPU's, which has an exception of its own, or a CPU's, which PyTorch only words."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(failure, (torch.OutOfMemoryError, MemoryError)) or any(w in str(failure) for w in words)


def failure_status(failure: BaseException) -> str:
    """What a record says of a method or a model that did not run."""
    if out_of_memory(failure):
        return "out of memory"
    first = (str(failure).splitlines() or [""])[0]
    return f"failed: {type(failure).__name__}: {first[:200]}"


def results_folder(device: torch.device) -> Path:
    """`results/<device>`, with a name that any file system takes."""
    slug = "".join(c if c.isalnum() else "-" for c in device_name(device).lower()).strip("-")
    while "--" in slug:
        slug = slug.replace("--", "-")
    return ROOT / "results" / slug
