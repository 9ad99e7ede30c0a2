"""Images per second, latency and memory of whole models, inference and training, on one device.

The default list and the paper's figures are those of *Faster Neighborhood Attention* (arXiv 2403.04690, model tables,
A100, batch 128).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg

import models  # noqa: F401  registers the zoo with timm
from benchmarks import summary
from benchmarks.cases import DTYPES
from benchmarks.device import describe, failure_status, out_of_memory

# images/s of the paper's table: naive, GEMM, fused in FP16, then in FP32.
PAPER = {
    "nat_mini": (2975, 2660, 3742, 2416, 2481, 2658),
    "dinat_mini": (2672, 2548, 3930, 2217, 2364, 2905),
    "dinat_s_tiny": (2850, 2504, 3847, 2270, 2255, 2771),
    "nat_tiny": (2167, 1939, 2772, 1739, 1802, 1942),
    "dinat_tiny": (1910, 1845, 2909, 1591, 1706, 2123),
    "dinat_s_small": (1800, 1571, 2445, 1403, 1393, 1717),
    "nat_small": (1457, 1309, 1879, 1160, 1199, 1293),
    "dinat_small": (1360, 1313, 2145, 1102, 1183, 1490),
    "dinat_s_base": (1351, 1178, 1837, 1020, 1009, 1240),
    "nat_base": (1110, 997, 1448, 867, 897, 966),
    "dinat_base": (982, 950, 1517, 795, 851, 1059),
    "dinat_s_large": (846, 744, 1119, 609, 601, 721),
    "dinat_large": (669, 647, 1042, 506, 540, 669),
    "dinat_s_large_384": (295, 239, 391, 211, 193, 245),
    "dinat_large_384_11x11": (153, 134, 312, 116, 115, 179),
}
# Hours of 300 epochs of the paper's training table, half precision, no bias: naive, GEMM, fused.
PAPER_HOURS = {
    "nat_mini": (19.4, 20.4, 16.6),
    "dinat_mini": (20.4, 21.2, 17.4),
    "dinat_s_tiny": (21.1, 22.0, 17.4),
    "nat_tiny": (26.5, 28.2, 24.0),
    "dinat_tiny": (27.4, 28.5, 21.9),
    "dinat_s_small": (33.3, 33.2, 25.1),
    "nat_small": (39.2, 41.8, 33.7),
    "dinat_small": (38.0, 40.1, 30.8),
    "dinat_s_base": (45.4, 46.1, 32.6),
    "nat_base": (51.1, 54.6, 47.7),
    "dinat_base": (54.4, 56.0, 41.0),
}
GPU_BACKENDS = ("naive", "gemm", "fused")
CONTEXT = ("swin_tiny_patch4_window7_224", "convnext_tiny", "vit_small_patch16_224")


@dataclass(frozen=True)
class Setting:
    """One row of the table: a model under timm's name and how it is run. `mode` is inference or training.

    Inference casts the weights to `precision`; training keeps float32 weights and computes under autocast.
    """

    model: str
    mode: str
    backend: str | None = None
    batch: int = 128
    precision: str = "bfloat16"
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False
    loading: bool = False

    @property
    def key(self) -> str:
        """What identifies the row in a results file; loading is named only where it is included."""
        *values, loading = asdict(self).values()
        return "/".join([*map(str, values)] + ["loading"] * loading)


def label(record: Mapping[str, Any]) -> str:
    """The column of a record in a table of models: its backend (`timm` for timm's models) and how it is run."""
    backend = record.get("backend")
    how = [name for name in ("compile", "cuda_graph", "channels_last", "loading") if record.get(name) is True]
    return ", ".join([backend if isinstance(backend, str) else "timm", *(name.replace("_", " ") for name in how)])


def on_gpu_backends(columns: Iterable[object]) -> bool:
    """Whether any of a table's columns, as `label` names them, is of a CUDA backend."""
    return any(str(column).split(",")[0] in GPU_BACKENDS for column in columns)


ZOO = ("nat", "dinat_s", "isotropic")  # the modules of this project's models, as timm lists them


def paper_gain(model: str, mode: str, precision: str) -> float | None:
    """The paper's improvement of fused over naive, %, of a model in `mode`; None where it has none."""
    if mode == "training":
        hours = PAPER_HOURS.get(model) if precision != "float32" else None
        return (hours[0] / hours[2] - 1) * 100 if hours else None
    figures = PAPER.get(model)
    first = 3 if precision == "float32" else 0
    return (figures[first + 2] / figures[first] - 1) * 100 if figures else None


def is_ours(name: str) -> bool:
    """Whether `name`, a tag behind a dot aside, is one of this project's models, whose attention has backends."""
    return any(name.split(".")[0] in timm.list_models(module=module) for module in ZOO)


def image_size(name: str) -> int:
    """The side in pixels that the model was published for."""
    config = timm.get_pretrained_cfg(name)
    return config.input_size[-1] if config is not None else 224


def build(setting: Setting, device: torch.device) -> nn.Module:
    """The model of a setting, on its device, in its mode."""
    arguments = {"attn_backend": setting.backend} if is_ours(setting.model) and setting.backend else {}
    model = timm.create_model(setting.model, **arguments).to(device)
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if setting.mode == "inference":
        return model.eval().to(DTYPES[setting.precision]).requires_grad_(False)
    return model.train()


def step_function(setting: Setting, device: torch.device) -> tuple[Callable[[Tensor], object], Tensor]:
    """One step of the setting as a function of a batch of images, and such a batch `[batch, 3, side, side]`."""
    model = build(setting, device)
    side = image_size(setting.model)
    dtype = DTYPES[setting.precision]
    images = torch.randn(setting.batch, 3, side, side, device=device)
    if setting.channels_last:
        images = images.to(memory_format=torch.channels_last)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if setting.compile else model
    if setting.mode == "inference":
        images = images.to(dtype)

        def infer(batch: Tensor) -> object:
            with torch.inference_mode():
                return forward(batch)

        return (_graphed(infer, images) if setting.cuda_graph else infer), images
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, fused=device.type == "cuda", capturable=setting.cuda_graph
    )
    targets = torch.randint(model.get_classifier().out_features, (setting.batch,), device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def train(batch: Tensor) -> object:
        context = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
        with context:
            loss = nn.functional.cross_entropy(forward(batch), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return (_graphed(train, images) if setting.cuda_graph else train), images


def _graphed(step: Callable[[Tensor], object], images: Tensor) -> Callable[[Tensor], object]:
    """The same step, of inference or of training with its optimizer, as one CUDA graph that reads `images` in place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(images)

    def replay(batch: Tensor) -> object:
        if batch is not images:
            images.copy_(batch)
        graph.replay()
        return None

    return replay


def device_times(averages: Iterable[FunctionEventAvg], cuda: bool) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds of its own) of everything that took the device's time, the longest first.

    On a GPU these are the kernels, copies and fills. A profile also books a kernel's time on the operator that launched
    it: counting both would count everything twice. On a CPU they are the operators.
    """
    found = []
    for event in averages:
        if cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found.append((event.key, event.count, event.self_device_time_total))
        elif not cuda and event.device_type == DeviceType.CPU:
            found.append((event.key, event.count, event.self_cpu_time_total))
    return sorted((row for row in found if row[2] > 0), key=lambda row: -row[2])


def attention_share(step: Callable[[Tensor], object], images: Tensor) -> float | None:
    """Share of a step's device time that is spent in `fastna` operators; None where there is none."""
    cuda = images.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step(images)
        if cuda:
            torch.cuda.synchronize()
    return share_of_attention(profile.events(), cuda)


def share_of_attention(events: Iterable[FunctionEvent], cuda: bool) -> float | None:
    """Device time under `fastna` operators, over all device time; None where there is none.

    An operator appears once more inside itself where autograd passes it on: only the outermost counts.
    """
    whole = ours = 0.0
    for event in events:
        on_cpu = event.device_type == DeviceType.CPU
        if cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            whole += event.self_device_time_total
        elif not cuda and on_cpu:
            whole += event.self_cpu_time_total
        if on_cpu and event.name.startswith("fastna::") and not _inside_ours(event):
            ours += event.device_time_total if cuda else event.cpu_time_total
    return ours / whole if ours and whole else None


def _inside_ours(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("fastna::"):
        parent = parent.cpu_parent
    return parent is not None


def _latencies(
    step: Callable[[Tensor], object], batches: Iterator[Tensor], seconds: float, device: torch.device
) -> list[float]:
    """Seconds of each of several synchronised steps."""
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < 5 or (time.perf_counter() - started < seconds and len(taken) < 1000):
        batch = next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return taken


def _throughput(step: Callable[[Tensor], object], batches: Iterator[Tensor], count: int, device: torch.device) -> float:
    """Seconds per step of `count` steps in a row, as a training loop or a server under load runs them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        step(next(batches))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / count


def measure(
    setting: Setting, device: torch.device, seconds: float, batches: Callable[[Tensor], Iterator[Tensor]] | None = None
) -> dict[str, Any]:
    """images/s, ms per step, latency percentiles, memory, attention's share; halves the batch when memory runs out.

    Args:
        batches: makes the stream of batches from an example; by default one synthetic batch: loading excluded.
    """
    batch = setting.batch
    while True:
        try:
            measured = _measure_once(dataclasses.replace(setting, batch=batch), device, seconds, batches)
            return {"status": "ok", "batch_used": batch} | measured
        except Exception as failure:  # one failing model is a row of the table, not its end
            if batch == 1 or not out_of_memory(failure):
                return {"status": failure_status(failure)}
        # Only here has the exception let go of the tensors that its frames held.
        torch.cuda.empty_cache()
        batch //= 2


def _measure_once(
    setting: Setting, device: torch.device, seconds: float, batches: Callable[[Tensor], Iterator[Tensor]] | None
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    step, images = step_function(setting, device)
    step(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    first_step = time.perf_counter() - started

    def same() -> Iterator[Tensor]:
        while True:
            yield images

    stream = batches(images) if batches else same()
    for _ in range(3 if device.type == "cuda" else 1):
        step(images)
    latencies = _latencies(step, stream, seconds / 2, device)
    once = statistics.median(latencies)
    count = max(3, min(500, int(seconds / 2 / once)))
    # The median of several runs of back-to-back steps: one disturbance does not decide the figure.
    per_step = statistics.median(_throughput(step, stream, -(-count // 3), device) for _ in range(3))
    ordered = sorted(latencies)
    record = {
        "images_per_second": setting.batch / per_step,
        "ms_per_step": per_step * 1e3,
        **{f"latency_p{p}_ms": ordered[min(p * len(ordered) // 100, len(ordered) - 1)] * 1e3 for p in (50, 90, 99)},
        "first_step_seconds": first_step,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "attention_share": None,
    }
    if not setting.cuda_graph:
        record["attention_share"] = attention_share(step, images)
    return record


def settings(names: Sequence[str], modes: Sequence[str], backends: Sequence[str], **how: Any) -> list[Setting]:
    """A row for every model and mode: with each of the backends for this project's models, with none for timm's."""
    return [
        Setting(name, mode, backend, **how)
        for mode in modes
        for name in names
        for backend in (backends if is_ours(name) else [None])
    ]


def pending(settings: Sequence[Setting], path: Path) -> list[Setting]:
    """The settings that the results in `path` lack."""
    there = {record["key"] for record in summary.records(path) if "key" in record}
    return [setting for setting in settings if setting.key not in there]


def run(
    settings: Sequence[Setting], device: torch.device, path: Path, seconds: float = 3.0, deadline: float | None = None,
    batches: Callable[[Tensor], Iterator[Tensor]] | None = None,
) -> None:  # fmt: skip
    """Measures every setting that the JSON-lines file `path` does not hold yet, and appends it there."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    wanted = pending(settings, path)
    with summary.append(path) as file, Progress(*columns, transient=True) as progress:
        for index, setting in enumerate(progress.track(wanted, description="models")):
            if deadline is not None and time.monotonic() > deadline:
                break
            if index == 0:
                file.write(json.dumps({"suite": "models", "environment": describe(device)}) + "\n")
            record = {"suite": "models", "key": setting.key, **asdict(setting)} | measure(
                setting, device, seconds, batches
            )
            file.write(json.dumps(record) + "\n")
            file.flush()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where a kernel has broken the context: nothing after it counts
                torch.cuda.empty_cache()
            torch._dynamo.reset()
