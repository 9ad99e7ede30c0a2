"""eval.py on ImageNet's sibling test sets laid out as they are published, against figures computed by hand."""

import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from sharing_runs import run
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo, create_transform
from timm.models import save_for_hf
from torchmetrics.functional.classification import multiclass_calibration_error

import models  # noqa: F401  (registers the zoo)

pytestmark = pytest.mark.xdist_group("sharing")

SYNSETS = ImageNetInfo().label_names()
DATA = {"input_size": (1, 32, 32), "mean": (0.3,), "std": (0.3,), "crop_pct": 1.0, "interpolation": "bicubic"}
OPTIONS = [
    "data=imagenet", "data.in_chans=1", "data.image_size=32", "data.mean=[0.3]", "data.std=[0.3]", "data.crop_pct=1.0",
    "data.workers=0", "data.batch_size=256", "trainer=cpu", "report.enabled=false",
]  # fmt: skip


class World:
    """A model of 1,000 classes in timm's format, digits as pictures, and what the model says of each."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        model = timm.create_model(
            "nat_mini", embed_dim=32, depths=(1, 1), kernel_size=3, num_classes=1000, in_chans=1
        ).eval()
        torch.nn.init.normal_(model.head.weight, std=0.5)  # answers of every kind
        save_for_hf(model, str(folder / "model"), safe_serialization=True, data_config=DATA)
        pixels = np.round(load_digits().images[:400] * (255 / 16)).astype(np.uint8)
        self.pictures = [Image.fromarray(array).resize((32, 32), Image.Resampling.BICUBIC) for array in pixels]
        transform = create_transform(**DATA, is_training=False)
        with torch.inference_mode():
            self.logits = model(torch.stack([transform(picture) for picture in self.pictures]))
        self.surest = self.logits.softmax(-1).argmax(0).tolist()

    def picture_for(self, label: int) -> int:
        """The picture that the model is surest to be of this class."""
        return self.surest[label]

    def write(self, path: Path, picture: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.pictures[picture].save(path)

    def evaluate(self, name: str, *options: str) -> dict:
        """The figures that eval.py writes."""
        output = self.folder / f"figures-{name}"
        run("eval.py", f"ckpt={self.folder / 'model'}", f"output_dir={output}", *OPTIONS, *options)
        return json.loads((output / "metrics.json").read_text())

    def check(self, found: dict, pictures: Sequence[int], right: Sequence[Sequence[int]], among: Sequence[int]) -> None:
        """`right`: the classes accepted for each picture; `among`: the classes to choose from."""
        hidden = torch.full_like(self.logits, -torch.inf)
        hidden[:, list(among)] = self.logits[:, list(among)]
        best = hidden[list(pictures)].topk(5).indices.tolist()
        top1 = np.mean([guess[0] in accepted for guess, accepted in zip(best, right, strict=True)])
        top5 = np.mean([bool({*guess} & {*accepted}) for guess, accepted in zip(best, right, strict=True)])
        assert found["images"] == len(pictures)
        assert found["top1"] == pytest.approx(top1)
        assert found["top5"] == pytest.approx(top5)
        assert 0 < top1 < top5 < 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("imagenet"))


def published_indices(name: str) -> list[int]:
    content = pkgutil.get_data("timm.data", f"_info/imagenet_{name}_indices.txt")
    assert content is not None
    return [int(line) for line in content.split()]


@pytest.mark.parametrize("name", ["a", "r"])
def test_a_and_r_choose_among_their_200_classes(world: World, name: str) -> None:
    among = published_indices(name)
    assert len(among) == 200
    for label in among:
        world.write(world.folder / name / SYNSETS[label] / "art_0.jpg.png", world.picture_for(label))
    found = world.evaluate(name, f"data.root={world.folder / name}", f"data.labels={name}")
    world.check(found, [world.picture_for(label) for label in among], [[label] for label in among], among)


def test_v2_folders_are_class_numbers_not_alphabetical(world: World) -> None:
    for label in range(1000):
        world.write(world.folder / "v2" / str(label) / "0af3.png", world.picture_for(label))
    found = world.evaluate("v2", f"data.root={world.folder / 'v2'}", "data.labels=v2")
    labels = range(1000)
    world.check(found, [world.picture_for(label) for label in labels], [[label] for label in labels], labels)


def test_imagenet_needs_validation_images_only_and_real_takes_any_of_several_labels(world: World) -> None:
    """Numbers run across classes as in the validation set: image i is of class (7 i) mod 1000."""
    random = np.random.default_rng(0)
    accepted: list[list[int]] = []
    pictures = []
    for number in range(1000):
        label = 7 * number % 1000
        picture = world.picture_for(label)
        path = world.folder / "in1k" / "val" / SYNSETS[label] / f"ILSVRC2012_val_{number + 1:08d}.png"
        world.write(path, picture)
        pictures.append(picture)
        several = [label, *random.integers(0, 1000, 1).tolist(), int(world.logits[picture].argsort()[-3])]
        accepted.append([[], [label], several[1:], several][number % 4])
    labels = world.folder / "real.json"
    labels.write_text(json.dumps(accepted))
    found = world.evaluate(
        "real", f"data.root={world.folder / 'in1k'}", "data.labels=real", f"data.labels_file={labels}"
    )
    kept = [number for number in range(1000) if accepted[number]]
    assert len(kept) == 750
    world.check(found, [pictures[number] for number in kept], [accepted[number] for number in kept], range(1000))
    plain = world.evaluate("in1k", f"data.root={world.folder / 'in1k'}")
    world.check(plain, pictures, [[7 * number % 1000] for number in range(1000)], range(1000))
    line = run("train.py", "data=imagenet", f"data.root={world.folder / 'in1k'}", check=False).error
    assert "data=imagenet has no training images" in line


def test_sketch_and_calibration(world: World) -> None:
    for label in range(1000):
        world.write(world.folder / "sketch" / SYNSETS[label] / "sketch_1.png", world.picture_for(label))
    found = world.evaluate("sketch", f"data.root={world.folder / 'sketch'}", "data.labels=sketch")
    pictures = [world.picture_for(label) for label in range(1000)]
    world.check(found, pictures, [[label] for label in range(1000)], range(1000))
    probability = world.logits[pictures].softmax(-1)
    expected = multiclass_calibration_error(probability, torch.arange(1000), 1000, n_bins=15)
    assert found["calibration_error"] == pytest.approx(expected.item(), abs=1e-4)
    bins = pd.read_csv(world.folder / "figures-sketch" / "calibration.csv")
    assert bins["images"].sum() == 1000
    gaps = (bins["images"] * (bins["accuracy"] - bins["confidence"]).abs()).sum() / 1000
    assert gaps == pytest.approx(found["calibration_error"])
    per_class = pd.read_csv(world.folder / "figures-sketch" / "per_class.csv", index_col=0)
    assert list(per_class.index) == SYNSETS
    assert per_class["recall"].mean() == pytest.approx(found["top1"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["data.root=tests", "data.labels=a"], "has no folder for class 'n01498041'"),
        (["data.root=tests", "data.labels=b"], "data.labels='b': must be one of real, v2, a, r, sketch"),
        (["data.root=tests", "data.labels=r", "data.labels_file=x"], "data.labels_file='x': must be null unless"),
        (["data.root=tests", "data.labels=real", "data.labels_file=README.md"], "data.labels_file: cannot read"),
        (["data=digits"], "knows the 1000 classes"),
    ],
)
def test_what_is_no_such_set_is_refused_in_one_line(world: World, options: list[str], said: str) -> None:
    assert said in run("eval.py", f"ckpt={world.folder / 'model'}", *OPTIONS, *options, check=False).error


def test_training_on_an_evaluation_set_is_refused() -> None:
    line = run("train.py", "data=imagenet", "data.root=tests", "data.labels=a", check=False).error
    assert "data.labels=a: the set serves evaluation only" in line
