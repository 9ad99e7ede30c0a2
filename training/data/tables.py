"""What data sets have in common that come as tables: class names that agree, and splits made here."""

from collections.abc import Sequence
from typing import Any

from training.data.images import Images, Selection, Splits, stratified_split
from training.errors import DataError


def name_classes(labels: Sequence[int | str], names: Sequence[str] | None, where: str) -> tuple[list[str], list[int]]:
    """Class names and the index of each label.

    Numbers index `names`; words are looked up in them. Without names, numbers count from 0 and are their own
    names, and words are sorted.

    Raises:
        DataError: a label that has no name.
    """
    numbers = all(isinstance(label, int) for label in labels)
    if names is None:
        names = (
            [str(number) for number in range(max(labels, default=-1) + 1)]  # type: ignore[arg-type]
            if numbers
            else sorted({str(label) for label in labels})
        )
    place = {name: index for index, name in enumerate(names)}
    targets = []
    for label in labels:
        target = label if isinstance(label, int) else place.get(label, -1)
        if not 0 <= target < len(names):
            raise DataError(f"{where} has the label {label!r}: there are {len(names)} classes, {shorten(names)}")
        targets.append(target)
    return list(names), targets


def shorten(names: Sequence[str]) -> str:
    """The first names, for an error message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def make_splits(
    classes: list[str], train: Images, val: Images | None, test: Images | None, fraction: float, seed: int
) -> Splits:
    """The three parts; without `val`, a stratified `fraction` of `train` is held out for it."""
    if val is None:
        kept, held_out, _ = stratified_split(list(train.targets), classes, fraction, 0, seed)
        train, val = Selection(train, kept), Selection(train, held_out)
    return Splits(classes, train, val, val if test is None else test)


def missing_package(reader: str, error: ModuleNotFoundError) -> DataError:
    """The error for a reader whose package is an optional dependency."""
    return DataError(f"data={reader} needs the package {error.name}: pip install 'fastna[data]'")


def first_line(error: Any) -> str:
    """The first line of an error of another library, whose texts can be pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
