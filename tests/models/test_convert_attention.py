"""Plain vision transformers of timm, made near-sighted."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from models import convert_attention

PREFIXES = {
    "vit_tiny_patch16_224": 1,
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_small_patch16_dinov3": 5,
    "eva02_tiny_patch14_224": 1,
    "vit_base_patch32_siglip_256": 0,
}


def make(name, **kwargs):
    torch.manual_seed(0)
    narrow = {"embed_dim": 64, "num_heads": 2, "depth": 3, "num_classes": 7, "dynamic_img_size": True}
    model = timm.create_model(name, **{**narrow, **kwargs}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return model


def images(model, height, width, batch=2):
    patch = model.patch_embed.patch_size[0]
    return torch.randn(batch, 3, patch * height, patch * width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PREFIXES)
@torch.no_grad()
def test_a_window_over_the_whole_map_changes_nothing(name):
    model = make(name)
    assert model.num_prefix_tokens == PREFIXES[name]
    x = images(model, 5, 8)
    converted = convert_attention(copy.deepcopy(model), window=8)
    assert list(converted.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)
    square = images(model, 6, 6)
    torch.testing.assert_close(converted(square), model(square), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_patches_see_their_window_and_the_prefix(name):
    model = convert_attention(make(name, depth=1), window=(3, 5), dilation=2)
    attention, prefix = model.blocks[0].attn, model.num_prefix_tokens
    attention.grid.size = (8, 11)
    tokens = torch.randn(1, prefix + 88, 64, requires_grad=True)

    def seen_by(token):
        (gradient,) = torch.autograd.grad(attention(tokens)[0, token].sum(), tokens)
        return gradient[0].abs().sum(-1) > 0

    assert seen_by(0).all()
    patch = seen_by(prefix + 4 * 11 + 5)
    assert patch[:prefix].all()
    window = torch.zeros(8, 11, dtype=torch.bool)
    window[2:7:2, 1:10:2] = True
    assert torch.equal(patch[prefix:].view(8, 11), window)


@torch.no_grad()
def test_a_copy_has_its_own_map():
    model = convert_attention(make("vit_tiny_patch16_224"), window=3)
    expected = model(images(model, 6, 9))
    averaged = copy.deepcopy(model)
    model(images(model, 4, 4))
    torch.testing.assert_close(averaged(images(model, 6, 9)), expected)


def test_it_trains_at_high_resolution():
    model = convert_attention(make("vit_tiny_patch16_224"), window=7).train()
    model(images(model, 20, 30, batch=1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_backbone_of_features_is_converted_within():
    backbone = timm.create_model("vit_tiny_patch16_224", features_only=True, depth=3, dynamic_img_size=True)
    images = torch.randn(1, 3, 80, 112)
    whole = backbone.eval()(images)
    assert convert_attention(backbone, window=7) is backbone
    torch.testing.assert_close(backbone(images), whole, rtol=1e-4, atol=1e-4)  # the window holds the map of 5 x 7
    convert_attention(backbone, window=3)
    assert not torch.allclose(backbone(images)[-1], whole[-1], rtol=1e-3)


def test_it_compiles_and_exports():
    model = convert_attention(make("vit_small_patch16_dinov3", depth=1), window=3)
    x = images(model, 5, 6)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@torch.no_grad()
def test_a_converted_model_converts_again():
    model = make("vit_tiny_patch16_224")
    x = images(model, 6, 6)
    expected = model(x)
    near = convert_attention(model, window=3)(x)
    assert not torch.allclose(near, expected)
    torch.testing.assert_close(convert_attention(model, window=6)(x), expected, rtol=1e-4, atol=1e-4)
    assert len(model.patch_embed._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: timm.create_model("resnet10t"), {"window": 7}, "model = ResNet: its attention cannot be converted"),
        (lambda: make("vit_tiny_patch16_224"), {"window": 0}, "window = 0"),
        (lambda: make("vit_tiny_patch16_224"), {"window": 7, "dilation": (1, 2)}, "one for each of the 3 blocks"),
        (lambda: make("vit_tiny_patch16_224", patch_drop_rate=0.5), {"window": 7}, "patch_drop_rate=0"),
        (lambda: make("vit_tiny_patch16_224", attn_drop_rate=0.5), {"window": 7}, "attn_drop_rate=0"),
    ],
)
def test_what_cannot_be_converted_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_attention(model(), **arguments)


def test_masks_are_refused():
    model = convert_attention(make("vit_tiny_patch16_224"), window=3)
    with pytest.raises(ValueError, match="attn_mask"):
        model(images(model, 4, 4), attn_mask=torch.ones(17, 17, dtype=torch.bool))
