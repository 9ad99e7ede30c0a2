"""Weights from every source reach the model, whole, or an error says what does not fit."""

from __future__ import annotations

import os
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
from published import fill, layouts, state_dict
from timm.models import _builder

import models
from models.checkpoints import adapt_channels, native_state_dict

TINY = {"embed_dim": 32, "depths": (1, 1, 1, 1), "init_values": 0.1}


def make(**kwargs):
    return timm.create_model("nat_base", **{**TINY, **kwargs})


def weights(**kwargs):
    return {key: fill(key, tuple(value.shape)) for key, value in make(**kwargs).state_dict().items()}


def to_hugging_face(native):
    """A native NAT state dict under the names of the Hugging Face files."""
    named = {}
    names = [
        ("patch_embed.proj", "nat.embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "nat.embeddings.norm"),
        ("levels.", "nat.encoder.levels."),
        (".blocks.", ".layers."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.rpb", ".attention.self.rpb"),
        (".attn.proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ]
    for key, value in native.items():
        if key.startswith(("norm.", "head.")):
            named[key.replace("norm.", "nat.layernorm.").replace("head.", "classifier.")] = value
            continue
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[key.replace(".attn.qkv.", f".attention.self.{part}.")] = rows.contiguous()
        elif key.endswith("gamma1"):
            scales = torch.stack(
                [value, native[key.replace("nat.encoder.", "").replace(".layers.", ".blocks.")[:-1] + "2"]]
            )
            named[key.replace("gamma1", "layer_scale_parameters")] = scales
        elif not key.endswith("gamma2"):
            named[key] = value
    return named


def same(model, expected):
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    return all(torch.equal(loaded[key], value) for key, value in expected.items())


FORMATS = {
    "original.pth": lambda w: w,
    "compiled.pth": lambda w: {f"_orig_mod.{key}": value for key, value in w.items()},
    "parallel.pth": lambda w: {f"module.{key}": value for key, value in w.items()},
    "pytorch_model.bin": to_hugging_face,
    "model.safetensors": to_hugging_face,
    "native.safetensors": lambda w: w,
    "last.ckpt": lambda w: {
        "epoch": 3,
        "state_dict": {f"model._orig_mod.{key}": value for key, value in w.items()} | {"loss.weight": torch.ones(2)},
        "hyper_parameters": {"lr": 0.1},
    },
}


@pytest.mark.parametrize("file", FORMATS)
def test_every_format_loads(file, tmp_path):
    content = FORMATS[file](weights())
    save = safetensors.torch.save_file if file.endswith("safetensors") else torch.save
    save(content, tmp_path / file)
    model = make()
    report = models.load_checkpoint(model, tmp_path / file)
    assert same(model, weights())
    assert report.weights == "weights"
    assert not report.changed
    assert not report.reinitialised


def test_hugging_face_names_are_those_of_the_published_files():
    native = timm.create_model("nat_mini", embed_dim=64).state_dict()
    theirs = {key: tuple(value.shape) for key, value in to_hugging_face(native).items()}
    assert theirs == layouts()["hf_nat_mini"]


def test_every_published_hugging_face_key_is_translated():
    native = native_state_dict(state_dict("hf_dinat_base"))
    assert {key: tuple(value.shape) for key, value in native.items()} == layouts()["dinat_base"]
    scales = fill("dinat.encoder.levels.3.layers.4.layer_scale_parameters", (2, 1024))
    assert torch.equal(native["levels.3.blocks.4.gamma1"], scales[0])
    assert torch.equal(native["levels.3.blocks.4.gamma2"], scales[1])
    key_rows = native["levels.0.blocks.0.attn.qkv.weight"][128:256]
    assert torch.equal(key_rows, fill("dinat.encoder.levels.0.layers.0.attention.self.key.weight", (128, 128)))


def test_averaged_weights_come_first(tmp_path):
    averaged = {key: value + 1 for key, value in weights().items()}
    file = tmp_path / "best.ckpt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in weights().items()}, "ema_state_dict": averaged}, file)
    model = make()
    assert models.load_checkpoint(model, file).weights == "averaged weights"
    assert same(model, averaged)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(weights(), path)
    return path


def test_a_head_of_another_class_count_stays_fresh(file, caplog):
    model = make(num_classes=5)
    fresh = model.head.weight.clone()
    with caplog.at_level("INFO", logger="models.checkpoints"):
        report = models.load_checkpoint(model, file)
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.norm.weight, weights()["norm.weight"])
    assert report.reinitialised == ("head.weight", "head.bias")
    assert "the file has 1000 classes, the model 5" in caplog.text


def test_a_model_without_head_leaves_it(file):
    model = make(num_classes=0)
    models.load_checkpoint(model, file)
    assert torch.equal(model.norm.weight, weights()["norm.weight"])


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile])
def test_a_backbone_of_features_takes_what_it_has(file, wrap):
    model = make(features_only=True, out_indices=(0, 2))
    models.load_checkpoint(wrap(model), file)
    assert torch.equal(model.model.levels[2].blocks[0].norm1.weight, weights()["levels.2.blocks.0.norm1.weight"])


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_see_the_same_grey_image(file, channels):
    colour, other = make().eval(), make(in_chans=channels).eval()
    models.load_checkpoint(colour, file)
    assert models.load_checkpoint(other, file).changed == (f"patch_embed.proj.0.weight: 3 -> {channels} channels",)
    if channels == 1:
        grey = torch.randn(1, 1, 32, 32)
        torch.testing.assert_close(other(grey), colour(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_three_channels_become_others_as_in_timm(channels):
    weight = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(adapt_channels(weight, channels), timm.models.adapt_input_conv(channels, weight))


@torch.no_grad()
def test_a_grey_model_s_file_serves_colour(tmp_path):
    grey, colour = make(in_chans=1).eval(), make().eval()
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    models.load_checkpoint(colour, tmp_path / "grey.pth")
    image = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(colour(image.expand(-1, 3, -1, -1)), grey(image))


def test_another_window_resamples_the_bias(file):
    model = make(kernel_size=11)
    report = models.load_checkpoint(model, file)
    assert len(report.changed) == 4
    key = "levels.1.blocks.0.attn.rpb"
    expected = torch.nn.functional.interpolate(weights()[key][None], size=(21, 21), mode="bicubic")[0]
    assert torch.equal(model.state_dict()[key], expected)


def refused(model, file):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(models.CheckpointError) as caught:
        models.load_checkpoint(model, file)
    message = str(caught.value)
    assert same(model, before)
    assert str(file) in message
    assert "\n" not in message
    return caught.value


def test_keys_that_do_not_fit_are_all_named(tmp_path):
    content = weights()
    del content["norm.weight"], content["levels.2.blocks.0.attn.rpb"]
    content["levels.9.extra"] = torch.zeros(1)
    content["levels.0.blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "broken.pth")
    error = refused(make(), tmp_path / "broken.pth")
    assert sorted(error.missing) == ["levels.2.blocks.0.attn.rpb", "norm.weight"]
    assert error.unexpected == ("levels.9.extra",)
    for key in (*error.missing, *error.unexpected, "levels.0.blocks.0.mlp.fc1.bias (3,) where the model has (64,)"):
        assert key in str(error)


def test_hugging_face_parts_that_do_not_fit_together_are_named(tmp_path):
    content = to_hugging_face(weights())
    del content["nat.encoder.levels.0.layers.0.attention.self.key.weight"]
    content["nat.encoder.levels.1.layers.0.attention.self.value.bias"] = torch.zeros(3)
    content["nat.encoder.levels.2.layers.0.layer_scale_parameters"] = torch.zeros(3, 128)
    torch.save(content, tmp_path / "pytorch_model.bin")
    error = refused(make(), tmp_path / "pytorch_model.bin")
    blocks = [f"levels.{level}.blocks.0" for level in range(3)]
    assert {f"{blocks[0]}.attn.qkv.weight", f"{blocks[1]}.attn.qkv.bias", f"{blocks[2]}.gamma1"} < set(error.missing)
    assert {f"{blocks[0]}.attn.query.weight", f"{blocks[1]}.attn.value.bias"} < set(error.unexpected)


def test_published_files_load_without_any_help():
    """Strictly, as timm's `checkpoint_path` does: the index that ViT-RPB files hold follows from the map."""
    model = timm.create_model("vitrpb_small", embed_dim=64, depth=2)
    content = model.state_dict() | {f"layers.{i}.attn.relative_position_index": torch.zeros(9, 9) for i in range(2)}
    model.load_state_dict(content, strict=True)


def test_a_checkpoint_of_another_model(file):
    error = refused(timm.create_model("dinat_s_tiny", embed_dim=32), file)
    assert "is no checkpoint of this DiNATs" in str(error)
    assert f"{len(error.missing)} missing" in str(error)
    assert len(error.missing) > models.checkpoints.MAX_KEYS_NAMED
    assert len(str(error)) < 10_000


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
def test_a_damaged_file(tmp_path, suffix, damage):
    path = tmp_path / f"damaged{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(weights(), path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "noise": b"\x00\x9f" * 500, "empty": b""}[damage])
    assert "not a readable checkpoint" in str(refused(make(), path))


class Payload:
    """Runs a command when unpickled without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_file_cannot_run_code(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"state_dict": weights(), "payload": Payload(f"touch {trace}")}, tmp_path / "hostile.pth")
    assert "more than tensors and plain containers" in str(refused(make(), tmp_path / "hostile.pth"))
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": "b"}}])
def test_a_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    assert "holds no state dict" in str(refused(make(), tmp_path / "other.pth"))


def test_no_file(tmp_path):
    assert "no such checkpoint file" in str(refused(make(), tmp_path / "absent.pth"))


# Through timm: pretrained=True.


@pytest.fixture
def published(monkeypatch):
    """Serves published files from memory instead of the network; collects the addresses asked for."""
    asked = []

    def serve(content):
        def fetch(url, **_):
            asked.append(url)
            return dict(content)

        monkeypatch.setattr(_builder, "load_state_dict_from_url", fetch)
        return asked

    return serve


def test_pretrained_fetches_the_published_file(published):
    asked = published(weights())
    model = make(pretrained=True)
    assert asked == ["https://shi-labs.com/projects/nat/checkpoints/CLS/nat_base.pth"]
    assert same(model, weights())


def test_pretrained_adapts_to_the_task(published):
    published(weights())
    model = make(pretrained=True, num_classes=5, in_chans=1, kernel_size=5)
    assert model.head.out_features == 5
    assert torch.equal(model.norm.weight, weights()["norm.weight"])
    assert make(pretrained=True, features_only=True).feature_info.channels() == [32, 64, 128, 256]


def test_pretrained_on_22k_takes_the_head_of_the_file(published):
    tiny = {"embed_dim": 32, "depths": (1, 1, 1, 1)}
    content = {key: value for key, value in weights(num_classes=21842).items() if "gamma" not in key}
    published(content)
    model = timm.create_model("dinat_large_21k", pretrained=True, **tiny)
    assert model.num_classes == len(content["head.weight"])
    assert same(model, content)
    assert timm.create_model("dinat_large_21k", pretrained=True, num_classes=9, **tiny).head.out_features == 9
    assert timm.create_model("dinat_large_21k", **tiny).num_classes == 1000


def test_pretrained_offline_says_what_to_do(monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(_builder, "load_state_dict_from_url", unreachable)
    with pytest.raises(models.CheckpointError, match=r"weights of nat_base: .*no route to host.*load_checkpoint"):
        make(pretrained=True)
