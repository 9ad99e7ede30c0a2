"""How an impossible value of a configuration key is refused."""

from collections.abc import Mapping

from training.errors import ConfigError, did_you_mean


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Refuse `value` of `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: must be {rule}")


def require_plain_names(node: object, path: str = "") -> None:
    """Refuse keys such as `_target_` at any depth: they mean code elsewhere, and nothing here."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            full = f"{path}.{name}" if path else str(name)
            if str(name).startswith("_"):
                raise ConfigError(f"{full}: there is no such key; a configuration names no code")
            require_plain_names(value, full)


def require_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value!r}: must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")
