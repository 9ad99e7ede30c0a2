"""What goes wrong because of an input, not because of a bug: shown to the user as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of every error whose cause lies in what the user gave. Its text is one line: thing, value, rule, fix."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A data set that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is not finite."""


def one_line(text: str) -> str:
    """`text` with every run of white space, line ends included, made one space."""
    return " ".join(text.split())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
