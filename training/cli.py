"""The frame around an entry point: Hydra composes, errors of the user's become one line."""

import atexit
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import hydra
import torch
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from training.config import CONFIG_DIRECTORY, register_schemas
from training.errors import UserError, did_you_mean, one_line


def run_command(config_name: str, command: Callable[[DictConfig], None]) -> None:
    """Compose configs/`config_name`.yaml with the command line's overrides and call `command` with the result.

    Ends the process with 1 and one line on standard error where the cause is a configuration, a data set or a
    checkpoint. Everything else is a bug and keeps its traceback.
    """
    errors = _run(config_name, command)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if not errors:
            torch.distributed.destroy_process_group()
        _leave(1 if errors else 0)
    if errors:
        raise SystemExit(1)


def _leave(code: int) -> NoReturn:
    """Ends one process of several as the interpreter would, but for taking itself apart.

    gloo's threads let go of a collective's tensors when they find the time. A thread that asks for the interpreter
    while it is taken apart is ended by CPython in the middle of a C++ destructor: a complete run would abort.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(config_name: str, command: Callable[[DictConfig], None]) -> list[str]:
    """Runs the command; what was wrong, a line each, where it was the user's."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing several lines and exiting
    register_schemas()
    failures: list[UserError] = []

    @functools.wraps(command)
    def guarded(config: DictConfig) -> None:
        try:
            command(config)
        except UserError as error:  # raised through Hydra it would gain a line of Hydra's
            failures.append(error)

    try:
        hydra.main(version_base="1.3", config_path=CONFIG_DIRECTORY, config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        return [describe(error)]
    except AssertionError as error:  # OmegaConf's, where a key is set within a group that is null
        if "Unexpected type for root" not in str(error):
            raise
        key = next((word for word in sys.argv[1:] if word.startswith("data.")), "a key")
        return [f"{key}: no data set is named here to set it for; give data=... as well"]
    return [str(failure) for failure in failures]


def describe(error: BaseException) -> str:
    """One line that names the key or value that Hydra refused, with the nearest valid word where there is one."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = sorted(error.options)
        hint = did_you_mean(choice, options)
        return f"{group}={choice}: there is no such choice in configs/{hint}; choose one of {', '.join(options)}"
    text = one_line(str(error))
    cause = error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        return text
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        full = str(cause.full_key or cause.key)
        if ".kwargs." in full:
            return f"{full}: not given so far; to add it write +{full}=..."
        parent = cause.parent_node
        known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
        return f"{full}: there is no such key{did_you_mean(str(cause.key), known)}"
    return f"{text.rstrip('.')}: {one_line(str(cause.msg or cause).splitlines()[0])}"
