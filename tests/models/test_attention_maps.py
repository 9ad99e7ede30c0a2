"""Attention maps are the weights that the layer computes with."""

from __future__ import annotations

import pytest
import timm
import torch

from models import attention_layers, attention_maps


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("dinat_mini", embed_dim=32, depths=(2, 2, 1, 1), kernel_size=3, dilations=(3, 2, 1, 1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


IMAGES = torch.randn(2, 3, 52, 68, generator=torch.Generator().manual_seed(0))


def test_layers_are_named_from_image_to_head(model):
    assert attention_layers(model)[:2] == ["levels.0.blocks.0.attn", "levels.0.blocks.1.attn"]
    assert len(attention_layers(model)) == 6


@pytest.mark.parametrize("layer", ["levels.0.blocks.0.attn", "levels.0.blocks.1.attn", -1])
def test_maps_weigh_the_values_as_the_layer_does(model, layer):
    attention = model.get_submodule(layer if isinstance(layer, str) else attention_layers(model)[layer])
    seen = []
    hooks = [
        attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])),
        attention.proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])),
    ]
    model.eval()(IMAGES)
    model.train()
    for hook in hooks:
        hook.remove()
    tokens, output = seen
    height, width = tokens.shape[1:3]
    queries = [(0, 0), (height // 2, width - 1)]
    maps = attention_maps(model, IMAGES, layer, queries)
    heads = attention.num_heads
    assert maps.shape == (2, 2, heads, height, width)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 2, heads))
    weighed = torch.einsum("bqhyx,byxhc->bqhc", maps, attention.project(tokens)[2])
    at_queries = torch.stack([output[:, row, column] for row, column in queries], dim=1)
    torch.testing.assert_close(weighed.flatten(2), at_queries, rtol=1e-4, atol=1e-4)


def test_maps_are_zero_outside_the_window(model):
    maps = attention_maps(model, IMAGES, "levels.0.blocks.1.attn", [(6, 7)])
    window = torch.zeros(13, 17, dtype=torch.bool)
    window[3:10:3, 4:11:3] = True
    assert torch.equal(maps.gt(0), window.expand_as(maps))


def test_the_query_in_the_middle_is_the_default(model):
    assert torch.equal(attention_maps(model, IMAGES, 0), attention_maps(model, IMAGES, 0, [(6, 8)]))


def test_the_model_is_left_as_it_was(model):
    attention_maps(model, IMAGES)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("layer", ["levels.0", 6, -7])
def test_an_unknown_layer_is_refused_with_the_names_there_are(model, layer):
    with pytest.raises(ValueError, match=r"6 attention layers, named levels\.0\.blocks\.0\.attn, "):
        attention_maps(model, IMAGES, layer)


def test_a_query_off_the_map_is_refused(model):
    with pytest.raises(ValueError, match=r"query \(13, 0\) lies outside the 13 x 17 map"):
        attention_maps(model, IMAGES, 0, [(13, 0)])
