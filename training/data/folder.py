"""Images in class folders, already split or not; ImageNet is the same layout with a fixed split."""

from dataclasses import dataclass, field
from pathlib import Path

from training.config_data import FolderConfig
from training.data.decode import Decoder, EncodedImages
from training.data.images import Selection, Splits, stratified_split
from training.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
LAYOUT = "expected ROOT/{train,val[,test]}/CLASS/IMAGE, or ROOT/CLASS/IMAGE to be split"


@dataclass(frozen=True)
class ImageFiles(EncodedImages):
    """Image files with a class each."""

    paths: list[Path]
    targets: list[int]
    decoder: Decoder = field(default_factory=Decoder)

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def label(self, index: int) -> str:
        return str(self.paths[index])


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name; `._photo.jpg`, which macOS leaves beside each photo.jpg, is none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


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


def scan(folder: Path, classes: list[str], decoder: Decoder) -> ImageFiles:
    """All images of `folder`/CLASS, at any depth.

    Raises:
        DataError: the class folders are not exactly `classes`, or one holds no image.
    """
    found = {path.name: path for path in class_folders(folder)}
    for name in classes:
        if name not in found:
            raise DataError(f"{folder} has no folder for class {name!r}, one of the {len(classes)} expected")
    for name, path in found.items():
        if name not in classes:
            raise DataError(f"class folder {path} is unknown: {name!r} is none of the {len(classes)} expected")
    paths: list[Path] = []
    targets: list[int] = []
    for target, name in enumerate(classes):
        members = sorted(path for path in found[name].rglob("*") if is_image(path))
        if not members:
            raise DataError(f"class folder {found[name]} holds no images ({', '.join(sorted(EXTENSIONS))})")
        paths += members
        targets += [target] * len(members)
    return ImageFiles(paths, targets, decoder)


def open_folder(config: FolderConfig) -> Splits:
    """A folder split by hand (train/, val/ and perhaps test/), or one that is split here."""
    root, decoder = Path(config.root).expanduser(), Decoder(config.draft)
    parts = {path.name: path for path in class_folders(root)}
    if "train" in parts:
        if "val" not in parts:
            raise DataError(f"data.root: {root} has train/ but no val/; {LAYOUT}")
        classes = [path.name for path in class_folders(parts["train"])]
        train, val = scan(parts["train"], classes, decoder), scan(parts["val"], classes, decoder)
        return Splits(classes, train, val, scan(parts["test"], classes, decoder) if "test" in parts else val)
    classes = list(parts)
    images = scan(root, classes, decoder)
    split = stratified_split(
        images.targets, classes, config.validation_fraction, config.test_fraction, config.split_seed
    )
    train, val, test = (Selection(images, part) for part in split)
    return Splits(classes, train, val, test if test.indices else val)
