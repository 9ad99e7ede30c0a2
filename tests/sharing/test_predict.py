"""scripts/predict.py on real digits: every kind of source, checkpoint and output."""

import json
import re
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sharing_runs import run, write_malicious
from timm.data import create_transform, resolve_model_data_config

import models  # noqa: F401  (registers the zoo)

pytestmark = pytest.mark.xdist_group("sharing")


@pytest.fixture(scope="module")
def everything(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """All four outputs of one command over a folder, and what it printed."""
    folder = tmp_path_factory.mktemp("predicted")
    outputs = [folder / f"predictions.{kind}" for kind in ("csv", "json", "parquet", "html")]
    return folder, run("scripts/predict.py", pictures, "--checkpoint", checkpoint, "--output", *outputs)


def expected(exported: Path, paths: list[str]) -> torch.Tensor:
    """Probabilities by timm alone: its loader, its transform."""
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(path).convert("L")) for path in paths])).softmax(-1)


def test_tables_hold_what_timm_computes_from_the_export(everything, exported, pictures) -> None:
    folder, _ = everything
    table = pd.read_csv(folder / "predictions.csv")
    read = table[table["error"].isna()]
    assert len(read) == 40
    assert list(read["image"]) == sorted(read["image"])
    probability, best = expected(exported, list(read["image"])).topk(5)
    for rank in range(5):
        assert read[f"probability_{rank + 1}"].to_numpy() == pytest.approx(probability[:, rank].numpy(), abs=1e-5)
    assert read["class_1"].astype(int).tolist() == best[:, 0].tolist()
    parquet = pd.read_parquet(folder / "predictions.parquet")
    assert parquet["image"].tolist() == table["image"].tolist()
    assert parquet["probability_1"].to_numpy() == pytest.approx(table["probability_1"].to_numpy(), nan_ok=True)
    records = json.loads((folder / "predictions.json").read_text())
    assert [record["image"] for record in records] == table["image"].tolist()
    tops = [record["predictions"][0]["class"] for record in records if "predictions" in record]
    assert tops == [str(int(name)) for name in read["class_1"]]


def test_unreadable_images_are_listed_everywhere_and_stop_nothing(everything) -> None:
    folder, done = everything
    assert "40 images predicted, 2 unreadable" in done.out
    assert "noise.png: no image of a known format\n" in done.err
    for name in ("broken.png", "noise.png"):
        assert re.search(rf"^unreadable: .*{name}: .+", done.err, re.MULTILINE)
        row = pd.read_csv(folder / "predictions.csv").set_index("image").filter(like=name, axis=0)
        assert row["error"].notna().all()
        assert row["class_1"].isna().all()
        assert name in (folder / "predictions.html").read_text()
    records = json.loads((folder / "predictions.json").read_text())
    assert sum(record.get("error") is not None for record in records) == 2


def test_gallery_is_one_file_with_bars_and_attention(everything) -> None:
    page = (everything[0] / "predictions.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert page.count("<article>") == 40
    assert page.count('class="bar"') == 40 * 5
    assert page.count("levels.0.blocks.0.attn") == 40
    assert len(sources) == 40 * (1 + len(set(re.findall(r"levels\.\d+\.blocks\.\d+\.attn", page))))


def test_shards_patterns_workers_and_precision_give_the_same_classes(everything, exported, pictures, tmp_path) -> None:
    for number, digits in enumerate(("01234", "56789")):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as shard:
            for path in sorted(p for digit in digits for p in (pictures / digit).glob("*.png")):
                shard.add(path, path.name)
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "shard-1.tar").read_bytes()[:3000])
    output = tmp_path / "out.csv"
    done = run(
        "scripts/predict.py", tmp_path / "shard-{0..1}.tar", tmp_path / "c*.tar", "--checkpoint", exported,
        "--output", output, "--workers", 2, "--batch-size", 7, "--precision", "bf16-mixed", "--top", 1,
    )  # fmt: skip
    ours = pd.read_csv(output)
    assert ours["image"].str.startswith(f"{cut}").sum() >= 1
    assert "unreadable" in done.err
    assert f"unreadable: {cut}: after " in done.err
    ours = ours[~ours["image"].str.startswith(str(cut)) & ours["error"].isna()]
    theirs = pd.read_csv(everything[0] / "predictions.csv").dropna(subset=["class_1"])
    by_name = {Path(image).name: name for image, name in zip(theirs["image"], theirs["class_1"], strict=True)}
    assert len(ours) == len(by_name) == 40
    same = [by_name[Path(i).name] == c for i, c in zip(ours["image"], ours["class_1"], strict=True)]
    assert sum(same) >= 38  # a tie may fall otherwise in bfloat16


def test_bare_weights_decide_classes_and_channels(checkpoint, pictures, tmp_path) -> None:
    model = timm.create_model("nat_mini", num_classes=7, in_chans=1)
    bare = tmp_path / "bare.pth"
    torch.save(model.state_dict(), bare)
    image = next((pictures / "4").glob("*.png"))
    output = tmp_path / "one.json"
    run("scripts/predict.py", image, "--checkpoint", bare, "--model", "nat_mini", "--top", 9, "--output", output)
    (record,) = json.loads(output.read_text())
    assert sorted(entry["class"] for entry in record["predictions"]) == list("0123456")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.png"], "nowhere.png: no such file, folder or pattern"),
        (["README.md", "--checkpoint", "absent.ckpt"], "there is no checkpoint absent.ckpt"),
        (["README.md", "--checkpoint", "dinat_tniy"], "did you mean 'dinat_tiny'"),
        (["README.md", "--checkpoint", "local-dir:absent"], "cannot load local-dir:absent"),
        (["README.md", "--checkpoint", "a.pth", "--model", "nat_mini"], "no such checkpoint file"),
        (
            ["README.md", "--checkpoint", "docs", "--model", "nat_mini"],
            "docs: a folder; name the file",
        ),
        (["README.md", "--output", "README.md/x.csv"], "README.md: the folder cannot be made: File exists"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(checkpoint, arguments, said) -> None:
    if "--checkpoint" not in arguments:
        arguments = [*arguments, "--checkpoint", checkpoint]
    assert said in run("scripts/predict.py", *arguments, check=False).error


def test_the_folder_of_a_run_is_answered_with_its_checkpoint(trained, checkpoint, pictures) -> None:
    line = run("scripts/predict.py", pictures, "--checkpoint", trained, check=False).error
    assert line.endswith(f"did you mean {checkpoint}?")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bare_weights_alone_ask_for_their_architecture(exported, pictures, tmp_path, suffix) -> None:
    bare = exported / "model.safetensors"
    if suffix == ".pth":
        bare = tmp_path / "bare.pth"
        torch.save(load_file(exported / "model.safetensors"), bare)
    assert (
        "bare weights need it said: --model NAME"
        in run("scripts/predict.py", pictures, "--checkpoint", bare, check=False).error
    )


def test_names_with_brackets_are_shown_as_they_are(exported, pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    picture = tmp_path / "a [x] [red].png"
    picture.write_bytes((pictures / "0" / "0000.png").read_bytes())
    assert str(picture) in run("scripts/predict.py", picture, "--checkpoint", exported).out


@pytest.mark.parametrize("kind", ["own", "bare", "folder", "evaluate", "resume"])
def test_a_checkpoint_that_would_run_code_is_refused_unrun(kind: str, pictures: Path, tmp_path: Path) -> None:
    proof, path = tmp_path / "ran", tmp_path / "model.ckpt"
    if kind == "folder":
        path = tmp_path / "folder" / "pytorch_model.bin"
    write_malicious(path, proof)
    match kind:
        case "own":
            done = run("scripts/predict.py", pictures, "--checkpoint", path, check=False)
        case "bare":
            done = run("scripts/predict.py", pictures, "--checkpoint", path, "--model", "nat_mini", check=False)
        case "folder":
            config = {"architecture": "nat_mini", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 32, 32]}}
            (path.parent / "config.json").write_text(json.dumps(config))
            done = run("scripts/predict.py", pictures, "--checkpoint", path.parent, check=False)
        case "evaluate":
            done = run("eval.py", f"ckpt={path}", check=False)
        case "resume":
            done = run("train.py", "experiment=digits", f"resume={path}", f"output_root={tmp_path}/o", check=False)
    assert str(tmp_path) in done.error
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file is harmless, so that nothing was tested"
