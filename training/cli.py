"""The frame around an entry point: Hydra composes, errors of the user's become one line."""

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from training.config import CONFIG_DIRECTORY, register_schemas
from training.errors import UserError, one_line


def run_command(config_name: str, command: Callable[[DictConfig], None]) -> None:
    """Compose configs/`config_name`.yaml with the command line's overrides and call `command` with the result.

    Ends the process with 1 and one line on standard error where the cause is a configuration, a data set or a
    checkpoint. Everything else is a bug and keeps its traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing several lines and exiting
    register_schemas()
    try:
        hydra.main(version_base="1.3", config_path=CONFIG_DIRECTORY, config_name=config_name)(command)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def describe(error: BaseException) -> str:
    """One line that names the key or value, with the nearest valid key where there is one."""
    text = one_line(str(error).split("\nTo append to your config")[0])
    cause = error.__cause__ or error
    key, parent = getattr(cause, "key", None), getattr(cause, "parent_node", None)
    if key is not None and isinstance(parent, DictConfig):
        near = get_close_matches(str(key), [str(k) for k in parent], n=1)
        if near:
            text += f"; did you mean {near[0]!r}?"
    return text
