"""CUDA graphs: whole models in one, memory that is used again, torch.compile's own graphs; and no tuning inside one."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from kernels import NeighborhoodAttention2d, na2d
from kernels.cuda import runtime, tuning


def captured(step, *, pool=None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`step` in a graph, and the tensor that replays write; called once outside first, which loads the kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = step()
    return graph, result


@pytest.mark.parametrize("name", ["nat_tiny", "dinat_tiny"])
def test_a_models_forward_pass_is_one_graph(cuda, name):
    timm = pytest.importorskip("timm")
    import models  # noqa: F401  (registers the zoo)

    model = timm.create_model(name, num_classes=10).to(cuda).eval()
    batch = torch.randn(4, 3, 224, 224, device=cuda)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        graph, logits = captured(lambda: model(batch))
        batch.copy_(torch.randn_like(batch))
        graph.replay()
        assert torch.equal(logits, model(batch))


@pytest.mark.parametrize("window", [7, 13], ids=["strip", "hopper"])
def test_graphs_that_share_memory_replay_after_it_was_used_again(cuda, window):
    """Tensor maps hold addresses: those of one graph's memory may be another tensor's by the time of the next."""

    def operands(seed: int) -> list[Tensor]:
        generator = torch.Generator(cuda).manual_seed(seed)
        shape = (2, 40, 40, 4, 64)
        return [torch.randn(shape, device=cuda, generator=generator).half() for _ in range(3)]

    inputs = operands(0)

    def step() -> Tensor:
        scaled = [tensor * 0.5 for tensor in inputs]  # in the graph's own memory
        return na2d(*scaled, window, backend="fused")

    first, first_result = captured(step)
    second, second_result = captured(step, pool=first.pool())
    for seed in (1, 2):
        for tensor, fresh in zip(inputs, operands(seed), strict=True):
            tensor.copy_(fresh)
        churn = [torch.full((1 << 20,), float("nan"), device=cuda) for _ in range(8)]
        expected = step()
        del churn
        for graph, result in ((first, first_result), (second, second_result)):
            graph.replay()
            assert torch.equal(result, expected)


def test_reduce_overhead_trains_as_eager_does(cuda):
    torch.manual_seed(0)
    model = nn.Sequential(NeighborhoodAttention2d(64, 2, 7), nn.GELU(), NeighborhoodAttention2d(64, 2, 7, dilation=2))
    model = model.to(cuda, torch.bfloat16)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # eager, recorded, replayed
        torch.manual_seed(seed)
        x = torch.randn(2, 14, 28, 64, device=cuda, dtype=torch.bfloat16)
        results = []
        for run in (model, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            output = run(x)
            output.float().square().mean().backward()
            results.append([output.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        for eager, replayed in zip(*results, strict=True):
            torch.testing.assert_close(replayed, eager, rtol=3e-2, atol=3e-3)


def test_a_choice_is_measured_on_the_device_and_never_in_a_capture(cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FASTNA_TUNING", "measure")
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    query, key, value = torch.randn(16, 28, 28, 3, 4, 32, device=cuda).half().unbind(-3)
    na2d(query, key, value, 5, backend="fused")
    (table,) = (tmp_path / "tuning").glob("*.json")
    ((name, entry),) = json.loads(table.read_text()).items()
    assert name.startswith("strip_forward: 28 x 28, window 5 x 5")
    assert entry["microseconds"][entry["choice"]] <= min(entry["microseconds"].values()) / tuning.MARGIN
    assert all(0.5 < taken < 1e4 for taken in entry["microseconds"].values())

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query.sum()
        assert runtime.timer(cuda) is None
    assert runtime.timer(cuda) is not None


def test_the_timer_tells_a_long_launch_from_a_short_one(cuda):
    timer = runtime.timer(cuda)
    small, large = (torch.zeros(count, device=cuda) for count in (1 << 10, 1 << 27))
    short, long = timer([lambda: small.add_(1), lambda: large.add_(1)])
    assert 1e-7 < 10 * short < long < 1e-1
