"""The 25 models are the published ones: their parameters, their structure, their answers."""

from __future__ import annotations

import pytest
import timm
import torch
from published import image, layouts, logits, state_dict
from torch.utils.flop_counter import FlopCounterMode

import models

PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_large_21k": 200_943_514,
    "dinat_large_21k_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "dinat_s_large_21k": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
}

DROP_PATH = {
    "nat_mini": 0.2,
    "nat_base": 0.5,
    "dinat_small": 0.3,
    "dinat_large_384": 0.35,
    "dinat_large_21k": 0.2,
    "dinat_s_small": 0.3,
    "dinat_s_large_21k": 0.2,
    "nat_isotropic_small": 0.1,
    "vitrpb_base": 0.4,
}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def dilations(model):
    return [[block.attn.dilation for block in level.blocks] for level in model.stages]


def test_the_registry_holds_every_model():
    assert set(
        timm.list_models(module="nat") + timm.list_models(module="dinat_s") + timm.list_models(module="isotropic")
    ) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_file(name):
    model = on_meta(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    # The index into the bias table follows from the map's size; the file stores it, the model does not.
    assert shapes == {k: s for k, s in layouts()[name].items() if not k.endswith("relative_position_index")}
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_weights_have_an_address_and_a_configuration(name):
    model = on_meta(name)
    config = model.pretrained_cfg
    keys = model.state_dict()
    assert config["url"].startswith("https://shi-labs.com/projects/")
    assert config["url"].endswith(".pth")
    assert config["license"] == "mit"
    assert config["interpolation"] == "bicubic"
    assert f"{config['first_conv']}.weight" in keys
    assert f"{config['classifier']}.weight" in keys
    assert config["crop_pct"] == (1.0 if "384" in name else 0.875)
    stride = 16 if "isotropic" in name or "vitrpb" in name else 32
    assert config["pool_size"] == tuple(side // stride for side in config["input_size"][1:])


def test_published_addresses_are_distinct():
    urls = [timm.models.get_pretrained_cfg(name).url for name in PARAMETERS]
    assert len(set(urls)) == len(PARAMETERS)
    assert urls[0] == "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"


@pytest.mark.parametrize(
    ("tagged", "hub"),
    [
        ("nat_tiny.in1k_hf", "shi-labs/nat-tiny-in1k-224"),
        ("dinat_base.in1k_hf", "shi-labs/dinat-base-in1k-224"),
        ("dinat_large_384_11x11.in22k_ft_in1k_hf", "shi-labs/dinat-large-11x11-in22k-in1k-384"),
    ],
)
def test_hugging_face_is_a_second_source(tagged, hub):
    config = timm.models.get_pretrained_cfg(tagged)
    assert (config.hf_hub_id, config.hf_hub_filename) == (hub, "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "per_level"),
    [("nat_mini", (1, 1, 1, 1)), ("dinat_mini", (8, 4, 2, 1)), ("dinat_large_384", (13, 6, 3, 1))],
)
def test_dilations_alternate_inside_a_level(name, per_level):
    expected = [
        [d if block % 2 else 1 for block in range(depth)] for d, depth in zip(per_level, on_depths(name), strict=True)
    ]
    assert dilations(on_meta(name)) == expected


def on_depths(name):
    return (3, 4, 6, 5) if name.endswith("mini") else (3, 4, 18, 5)


def test_the_large_window_keeps_the_dilations_of_the_small_one():
    model = on_meta("dinat_large_384_11x11")
    assert [max(level) for level in dilations(model)] == [8, 4, 2, 1]
    assert {block.attn.kernel_size for level in model.stages for block in level.blocks} == {11}


def test_isotropic_models_dilate_odd_blocks():
    assert [block.attn.dilation for block in on_meta("dinat_isotropic_small").layers] == [1, 2] * 6
    assert [block.attn.dilation for block in on_meta("nat_isotropic_small").layers] == [1] * 12


@pytest.mark.parametrize(("name", "rate"), DROP_PATH.items())
def test_drop_path_rises_linearly_to_the_published_rate(name, rate):
    blocks = [module for module in on_meta(name).modules() if isinstance(module, models.layers.Block)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([rate * i / (len(blocks) - 1) for i in range(len(blocks))])


def test_norms_have_the_published_epsilon():
    norms = [
        m
        for name in ("nat_base", "dinat_s_tiny", "vitrpb_small")
        for m in on_meta(name).modules()
        if isinstance(m, torch.nn.LayerNorm)
    ]
    assert {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [
        ("nat_tiny", 224, 4.3),
        ("nat_small", 224, 7.8),
        ("dinat_base", 224, 13.7),
        ("dinat_large_384", 384, 89.7),
        ("dinat_large_384_11x11", 384, 92.4),
        ("dinat_s_base", 224, 15.5),
        ("nat_isotropic_small", 224, 4.3),
    ],
)
@torch.no_grad()
def test_multiplications_are_as_many_as_published(name, size, billions):
    attention = 0

    def count(module, arguments, _):
        nonlocal attention
        _, height, width, dim = arguments[0].shape
        window, _ = module.window_for(height, width)
        attention += 2 * height * width * window[0] * window[1] * dim

    model = on_meta(name).eval()
    for module in model.modules():
        if isinstance(module, models.layers.NeighborhoodAttention):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device="meta"))
    assert (counter.get_total_flops() / 2 + attention) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("layout", sorted(logits()))
def test_answers_are_the_original_s(layout, tmp_path):
    model = timm.create_model(layout.removeprefix("hf_")).eval()
    file = tmp_path / "published.pth"
    torch.save(state_dict(layout), file)
    models.load_checkpoint(model, file)
    with torch.inference_mode():
        answer = model(image(1, 224))
    expected = logits()[layout]
    assert (answer - expected).norm() <= 1e-4 * expected.norm()
