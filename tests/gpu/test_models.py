"""Whole models on CUDA: the CPU's answers, and training that follows the reference backend's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
import models  # noqa: E402, F401  (registers the zoo)

# Depth adds up: a dozen layers, each within the operator's tolerance.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def build(name: str) -> nn.Module:
    """The model with every parameter away from its start: rpb and LayerScale too."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def answer(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every parameter."""
    model.zero_grad()
    logits = model(batch)
    nn.functional.cross_entropy(logits.float(), torch.arange(len(batch), device=batch.device) % 10).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("name", ["nat_tiny", "dinat_tiny"])
def test_forward_and_backward_equal_the_cpus(cuda, name):
    model = build(name).train()
    expected = answer(model, images(2))
    for dtype, tolerance in TOLERANCES.items():
        on_gpu = copy.deepcopy(model).to(cuda)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            actual = answer(on_gpu, images(2).to(cuda))
        assert actual.keys() == expected.keys()
        everything = [torch.cat([t.float().flatten().cpu() for t in result.values()]) for result in (actual, expected)]
        error = (everything[0] - everything[1]).norm() / everything[1].norm()
        assert error <= tolerance, f"{dtype}: {error:.2e} over logits and gradients"
        logits = (actual["logits"].float().cpu() - expected["logits"]).norm() / expected["logits"].norm()
        assert logits <= tolerance, f"{dtype}: {logits:.2e} over logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nat_tiny", "dinat_tiny"])
def test_ten_training_steps_follow_the_reference(cuda, name, dtype):
    batch = images(4).to(cuda)
    losses = {}
    for backend in ("fused", "reference"):
        model = build(name).to(cuda).train()
        model.set_attn_backend(backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        losses[backend] = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = nn.functional.cross_entropy(model(batch), torch.arange(4, device=cuda))
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    fused, reference = (torch.tensor(losses[backend]) for backend in ("fused", "reference"))
    assert reference[-1] < 0.9 * reference[0], "the steps train"
    torch.testing.assert_close(fused, reference, rtol=1e-3 if dtype == torch.float32 else 3e-2, atol=1e-3)


def test_a_compiled_model_equals_the_plain_one(cuda):
    model = build("dinat_mini").to(cuda).eval()
    with torch.no_grad():
        plain = model(images(1).to(cuda))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images(1).to(cuda))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
