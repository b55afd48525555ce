"""Numbers, flags and ids of a config.json, each checked and named when it is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllama.errors import ConfigError, quote


def is_number(value: Any) -> bool:
    """Whether JSON would call it a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def positive(name: str, value: Any) -> float:
    """A number above 0. Raises: ConfigError."""
    if not is_number(value) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {name} must be a positive number, got {quote(value)}")
    return float(value)


def positive_int(name: str, value: Any) -> int:
    """An integer above 0. Raises: ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"config.json: {name} must be a positive integer, got {quote(value)}")
    return value


def boolean(hf: Mapping[str, Any], name: str) -> bool:
    """A flag; null and an absent key are false. Raises: ConfigError."""
    value = hf.get(name)
    if value not in (None, True, False):
        raise ConfigError(f"config.json: {name} must be true or false, got {quote(value)}")
    return bool(value)


def per_layer(hf: Mapping[str, Any], name: str, num_layers: int) -> list[Any] | None:
    """A list with a value for each layer, or None. Raises: ConfigError."""
    value = hf.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != num_layers:
        raise ConfigError(f"config.json: {name} must be a list of {num_layers} values, one a layer, got {quote(value)}")
    return value


def token_ids(hf: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """One id or a list of them; null and an absent key are none. Raises: ConfigError."""
    value = hf.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ConfigError(f"config.json: {name} must be below vocab_size ({vocab_size}), got {quote(token_id)}")
    return tuple(ids)
