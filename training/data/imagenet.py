"""ImageNet-1k, and its sibling test sets, each by its published labels. Models answer with ImageNet-1k's classes.

    labels   root                                            scored
    real     as for ImageNet itself                          any of an image's labels; images without one left out
    v2       ROOT/NUMBER/*.jpeg, class numbers 0 to 999      1,000 classes
    sketch   ROOT/SYNSET/*.JPEG                              1,000 classes
    a, r     ROOT/SYNSET/*.jpg, 200 synsets                  200 classes: the model chooses among these only

Are we done with ImageNet? (arXiv 2006.07159); ImageNet-V2 (arXiv 1902.10811); ImageNet-Sketch (arXiv 1905.13549);
Natural Adversarial Examples (arXiv 1907.07174); The Many Faces of Robustness (arXiv 2006.16241).
"""

import json
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo

from training.config_data import ImageNetConfig
from training.data.decode import Decoder
from training.data.folder import class_folders, scan
from training.data.images import Selection, Splits
from training.errors import DataError


def open_imagenet(config: ImageNetConfig) -> Splits:
    """ImageNet-1k; classes are synset identifiers in alphabetical order, as in every published checkpoint.

    For an evaluation the validation images are enough: without a folder `train` there is nothing to train on.
    """
    if config.labels is not None:
        return open_evaluation_set(config)
    root, decoder = Path(config.root).expanduser(), Decoder(config.draft)
    train = root / "train"
    if not (root / "val").is_dir():
        raise DataError(f"data.root: there is no folder {root / 'val'}; expected ROOT/{{train,val}}/SYNSET/IMAGE")
    classes = [path.name for path in class_folders(train if train.is_dir() else root / "val")]
    val = scan(root / "val", classes, decoder)
    return Splits(classes, scan(train, classes, decoder) if train.is_dir() else Selection(val, []), val, val)


def open_evaluation_set(config: ImageNetConfig) -> Splits:
    """The set that `config.labels` names; every split is the whole set.

    Raises:
        DataError: the folder or the label file is not there, or not that set's.
    """
    root, decoder = Path(config.root).expanduser(), Decoder(config.draft)
    synsets = list(ImageNetInfo().label_names())
    match config.labels:
        case "real":
            return _real(root, synsets, config.labels_file, decoder)
        case "v2":
            images = scan(root, [str(number) for number in range(len(synsets))], decoder)  # by number, not by alphabet
            return Splits(synsets, images, images, images)
        case "sketch":
            images = scan(root, synsets, decoder)
            return Splits(synsets, images, images, images)
    chosen = _timm_file(f"imagenet_{config.labels}_synsets.txt").split()
    images = scan(root, chosen, decoder)
    return Splits(chosen, images, images, images, is_subset=True)


def _timm_file(name: str) -> str:
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode()


def _real(root: Path, synsets: list[str], labels_file: str | None, decoder: Decoder) -> Splits:
    labels = _read_real(Path(labels_file).expanduser() if labels_file is not None else None)
    images = scan(root / "val", synsets, decoder)
    numbers = [_number(path, len(labels)) for path in images.paths]
    kept = [place for place, number in enumerate(numbers) if labels[number - 1]]
    chosen = Selection(images, kept)
    return Splits(synsets, chosen, chosen, chosen, accepted=[labels[numbers[place] - 1] for place in kept])


def _read_real(path: Path | None) -> Sequence[Sequence[int]]:
    """For each image of the validation set, in the order of their numbers, its labels; often none, often several."""
    try:
        labels = json.loads(_timm_file("imagenet_real_labels.json") if path is None else path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data.labels_file: cannot read {path}: {error}") from error
    if not (isinstance(labels, list) and all(isinstance(found, list) for found in labels)):
        raise DataError(f"data.labels_file: {path} is no list of lists of class numbers, as real.json is")
    return labels


def _number(path: Path, count: int) -> int:
    found = re.fullmatch(r"ILSVRC2012_val_(\d{8})", path.stem)
    if found is None or not 1 <= int(found[1]) <= count:
        raise DataError(f"{path}: its name does not tell its label; expected ILSVRC2012_val_00000001 to {count:08d}")
    return int(found[1])
