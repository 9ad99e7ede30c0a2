"""timm's contract, on every family: shrunk in width and depth, otherwise the published models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils.model import freeze

import hubconf
import models

SHRUNK = {
    "nat_base": {"embed_dim": 32, "depths": (1, 2, 2, 1), "init_values": 0.5},
    "dinat_mini": {"embed_dim": 32, "depths": (2, 2, 2, 1)},
    "dinat_large_384_11x11": {"embed_dim": 32, "depths": (2, 1, 1, 1)},
    "dinat_s_tiny": {"embed_dim": 32, "depths": (2, 2, 1, 1)},
    "dinat_isotropic_small": {"embed_dim": 64, "depth": 4},
    "vitrpb_small": {"embed_dim": 64, "depth": 3},
}
PYRAMIDS = [name for name in SHRUNK if "isotropic" not in name and "vitrpb" not in name]


def make(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SHRUNK[name], **kwargs})


def images(*size, batch=2, channels=3):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SHRUNK)
def name(request):
    return request.param


def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=42).train()
    output = model(images(96, 96))
    output.square().mean().backward()
    assert output.shape == (2, 42)
    assert output.isfinite().all()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@torch.no_grad()
def test_features_head_and_classifier(name):
    model = make(name).eval()
    x = images(96, 128, batch=1)
    features = model.forward_features(x)
    stride = model.feature_info[-1]["reduction"]
    assert features.shape == (1, 96 // stride, 128 // stride, model.num_features)
    assert model.output_fmt == "NHWC"
    assert torch.equal(model.forward_head(features), model(x))
    assert model.get_classifier() is model.head
    before_classifier = model.forward_head(features, pre_logits=True)
    assert before_classifier.shape == (1, model.head_hidden_size)
    torch.testing.assert_close(before_classifier, features.mean((1, 2)))

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), before_classifier)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(7, "catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(x).shape == (1, 7)


def test_a_new_classifier_is_like_the_model():
    model = make("dinat_mini").double().eval()
    model.reset_classifier(5)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
    assert model.head.bias.eq(0).all()


@pytest.mark.parametrize("size", [(1, 1), (9, 40), (33, 57), (64, 200)])
@torch.no_grad()
def test_any_input_size(name, size):
    model = make(name, num_classes=3).eval()
    stride = model.feature_info[-1]["reduction"]
    features = model.forward_features(images(*size))
    assert features.shape[1:3] == tuple(-(-side // stride) for side in size)
    assert model(images(*size)).isfinite().all()


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(name, channels):
    model = make(name, in_chans=channels).eval()
    assert model.in_chans == channels
    assert model(images(32, 32, channels=channels)).shape == (2, 1000)


@torch.no_grad()
def test_padding_is_all_that_an_odd_image_adds():
    model = make("dinat_s_tiny").eval()
    x = images(61, 94)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 3))
    assert torch.equal(model(x), model(padded))


@torch.no_grad()
def test_intermediates(name):
    model = make(name).eval()
    x = images(70, 96)
    final, taken = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(taken) == len(model.feature_info)
    for feature, info in zip(taken, model.feature_info, strict=True):
        assert feature.shape[1] == info["num_chs"]
        assert feature.shape[2:] == (-(-70 // info["reduction"]), -(-96 // info["reduction"]))
    last_normalised = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last_normalised[0], final)
    early, first_two = model.forward_intermediates(x, indices=[0, 1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(first_two[1].movedim(-1, 1), taken[1])
    assert torch.equal(early, first_two[1])
    with pytest.raises(ValueError, match="output_fmt = 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
def test_intermediates_are_what_their_modules_give(name):
    model = make(name).eval()
    seen = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda *call: seen.append(call[2]))
    taken = model.forward_intermediates(images(64, 64), output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(seen, taken, strict=True))


@torch.no_grad()
def test_pruned_to_an_intermediate(name):
    model = make(name).eval()
    x = images(64, 64)
    expected = model.forward_intermediates(x, indices=[1], output_fmt="NHWC", intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model(x), expected)
    assert model.num_features == expected.shape[-1]
    assert len(model.stages) == 2


@pytest.mark.parametrize("size", [(96, 96), (75, 131)])
def test_backbone_of_a_dense_task(name, size):
    model = make(name, features_only=True).train()
    features = model(images(*size))
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(features) == len(channels) == (4 if name in PYRAMIDS else 3)
    for feature, width, reduction in zip(features, channels, reductions, strict=True):
        assert feature.shape == (2, width, *(-(-side // reduction) for side in size))
    sum(feature.square().mean() for feature in features).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_features_of_chosen_levels():
    model = make("dinat_mini", features_only=True, out_indices=(1, 3))
    assert [f.shape[1] for f in model(images(64, 64))] == [64, 256]


def test_dense_task_dilations():
    per_block = ((1, 16), (1, 4), (1, 2), (1,))
    model = make("dinat_mini", dilations=per_block, features_only=True).eval()
    assert [[b.attn.dilation for b in level.blocks] for level in model.model.levels] == [list(d) for d in per_block]
    assert all(feature.isfinite().all() for feature in model(images(150, 300)))


@pytest.mark.parametrize(
    ("dilations", "message"),
    [
        ((8, 4, 2), "dilations has 3 entries for 4 levels"),
        ((8, (1, 4, 1), 2, 1), r"dilations\[1\] has 3 entries for 2 blocks"),
        ((0, 4, 2, 1), "a dilation is at least 1"),
    ],
)
def test_dilations_that_do_not_fit(dilations, message):
    with pytest.raises(ValueError, match=message):
        make("dinat_mini", dilations=dilations)


def test_recomputed_blocks_give_the_same(name):
    model = make(name, drop_path_rate=0.0).train()
    x = images(64, 64)
    plain = model(x)
    plain.square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    recomputed = model(x)
    recomputed.square().sum().backward()
    torch.testing.assert_close(recomputed, plain)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key], msg=key)


def test_biases_by_position_and_scales_do_not_decay(name):
    model = make(name)
    decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())[1]["params"]
    names = {id(p): key for key, p in model.named_parameters()}
    assert decayed
    assert not [names[id(p)] for p in decayed if names[id(p)].endswith(("rpb", "bias", "gamma1", "gamma2"))]


def test_layer_decay_follows_depth(name):
    model = make(name)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(p): key for key, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    stages = model.stages_name
    block = (lambda level, i: f"{stages}.{level}.blocks.{i}") if name in PYRAMIDS else (lambda _, i: f"{stages}.{i}")
    stem = next(s for key, s in scale.items() if key.startswith("patch_embed"))
    first, second = scale[f"{block(0, 0)}.mlp.fc1.weight"], scale[f"{block(1, 0)}.mlp.fc1.weight"]
    assert stem < first
    assert first <= second < scale["head.weight"] == 1.0
    if name in PYRAMIDS:
        last = len(model.stages[0].blocks) - 1
        assert scale[f"{stages}.0.downsample.reduction.weight"] == scale[f"{block(0, last)}.mlp.fc1.weight"]
        assert scale[f"{stages}.0.downsample.reduction.weight"] == 0.5 * second


def test_stages_freeze_by_name():
    model = make("dinat_mini")
    freeze(model, ["patch_embed", "levels.0"])
    frozen = {key.split(".blocks")[0] for key, p in model.named_parameters() if not p.requires_grad}
    assert all(key.startswith(("patch_embed", "levels.0")) for key in frozen)
    model(images(32, 32)).sum().backward()
    assert model.levels[0].blocks[0].attn.rpb.grad is None
    assert model.levels[1].blocks[0].attn.rpb.grad is not None


@torch.no_grad()
def test_the_backend_is_the_model_s_to_choose(name):
    model = make(name, attn_backend="reference").double().eval()
    x = images(72, 72).double()
    reference = model(x)
    model.set_attn_backend("tiled")
    torch.testing.assert_close(model(x), reference)
    model.set_attn_backend("no_such_backend")
    with pytest.raises(ValueError, match="no_such_backend"):
        model(x)


def test_models_copy_and_repeat(name):
    model = make(name).eval()
    assert torch.equal(copy.deepcopy(model)(images(32, 32)), model(images(32, 32)))
    assert torch.equal(make(name).state_dict()["head.weight"], model.state_dict()["head.weight"])


@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny", "vitrpb_small"])
@torch.no_grad()
def test_compiles_into_one_graph(name):
    model = make(name).eval()
    x = images(64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["nat_base", "dinat_s_tiny", "vitrpb_small"])
@torch.no_grad()
def test_scripts_and_goes_through_a_file(name, tmp_path):
    model = make(name).eval()
    torch.jit.script(model).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    for size in ((64, 64), (33, 90)):  # windows follow the map in the script too
        torch.testing.assert_close(scripted(images(*size)), model(images(*size)))


@torch.no_grad()
def test_a_traced_graph_scripts(name):
    model = make(name).eval()
    traced = create_feature_extractor(model, return_nodes=["head"])
    scripted = torch.jit.script(traced)
    torch.testing.assert_close(scripted(images(64, 64))["head"], model(images(64, 64)))


def test_models_are_made_on_the_device_and_in_the_dtype_asked_for(name):
    model = make(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert {p.device.type for p in make(name, device="cpu").parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["nat_base", "dinat_s_tiny", "dinat_isotropic_small"])
@torch.no_grad()
def test_exports_with_any_batch(name):
    model = make(name).eval()
    exported = torch.export.export(model, (images(64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = images(64, 64, batch=5)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_trains_under_autocast(name):
    model = make(name, drop_path_rate=0.0).train()
    x = images(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    expected = model(x)
    assert (output.float() - expected).norm() <= 0.02 * expected.norm()


def test_torch_hub_finds_the_models():
    repository = str(Path(models.__file__).parents[1])
    model = torch.hub.load(repository, "dinat_tiny", source="local", embed_dim=32, depths=(1, 1, 1, 1))
    assert isinstance(model, models.NAT)


def test_torch_hub_offers_every_model():
    zoo = [name for module in ("nat", "dinat_s", "isotropic") for name in timm.list_models(module=module)]
    assert sorted(hubconf.__all__) == sorted(zoo)
    assert all(callable(getattr(hubconf, name)) for name in zoo)
