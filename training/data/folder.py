"""Images in class folders, already split or not; ImageNet is the same layout with a fixed split."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.config import FolderConfig, ImageNetConfig
from training.data.images import Selection, Splits, stratified_split
from training.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
LAYOUT = "expected ROOT/{train,val[,test]}/CLASS/IMAGE, or ROOT/CLASS/IMAGE to be split"


@dataclass(frozen=True)
class ImageFiles:
    """Image files with a class each."""

    paths: list[Path]
    targets: list[int]

    def load(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            image.load()
            return image

    def label(self, index: int) -> str:
        return str(self.paths[index])


def class_folders(folder: Path) -> list[Path]:
    """The visible folders in `folder`, by name.

    Raises:
        DataError: `folder` does not exist or holds no folder.
    """
    if not folder.is_dir():
        raise DataError(f"data.root: there is no folder {folder}; {LAYOUT}")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"data.root: {folder} holds no class folders; {LAYOUT}")
    return folders


def scan(folder: Path, classes: list[str]) -> ImageFiles:
    """All images of `folder`/CLASS, at any depth.

    Raises:
        DataError: the class folders are not exactly `classes`, or one holds no image.
    """
    found = {path.name: path for path in class_folders(folder)}
    for name in classes:
        if name not in found:
            raise DataError(f"{folder} has no folder for class {name!r}, which the training images have")
    for name, path in found.items():
        if name not in classes:
            raise DataError(f"class folder {path} is unknown: the training images have no class {name!r}")
    paths: list[Path] = []
    targets: list[int] = []
    for target, name in enumerate(classes):
        members = sorted(path for path in found[name].rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not members:
            raise DataError(f"class folder {found[name]} holds no images ({', '.join(sorted(EXTENSIONS))})")
        paths += members
        targets += [target] * len(members)
    return ImageFiles(paths, targets)


def open_folder(config: FolderConfig) -> Splits:
    """A folder split by hand (train/, val/ and perhaps test/), or one that is split here."""
    root = Path(config.root).expanduser()
    parts = {path.name: path for path in class_folders(root)}
    if "train" in parts:
        if "val" not in parts:
            raise DataError(f"data.root: {root} has train/ but no val/; {LAYOUT}")
        classes = [path.name for path in class_folders(parts["train"])]
        val = scan(parts["val"], classes)
        return Splits(
            classes, scan(parts["train"], classes), val, scan(parts["test"], classes) if "test" in parts else val
        )
    classes = list(parts)
    images = scan(root, classes)
    split = stratified_split(
        images.targets, classes, config.validation_fraction, config.test_fraction, config.split_seed
    )
    train, val, test = (Selection(images, part) for part in split)
    return Splits(classes, train, val, test if test.indices else val)


def open_imagenet(config: ImageNetConfig) -> Splits:
    """ImageNet-1k; classes are synset identifiers in alphabetical order, as in every published checkpoint."""
    root = Path(config.root).expanduser()
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(f"data.root: there is no folder {root / part}; expected ROOT/{{train,val}}/SYNSET/IMAGE")
    classes = [path.name for path in class_folders(root / "train")]
    val = scan(root / "val", classes)
    return Splits(classes, scan(root / "train", classes), val, val)
