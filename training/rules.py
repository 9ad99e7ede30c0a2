"""How an impossible value of a configuration key is refused."""

from training.errors import ConfigError, did_you_mean


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Refuse `value` of `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: must be {rule}")


def require_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value!r}: must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")
