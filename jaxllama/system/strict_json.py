"""JSON from files that may be hostile, read in one way: UTF-8, no key twice, no NaN, bounded depth."""

from __future__ import annotations

import json
from typing import Any

from jaxllama.errors import JaxLlamaError, one_line, quote


def parse_object(data: bytes, where: object, error_type: type[JaxLlamaError]) -> dict[str, Any]:
    """The JSON object that `data` holds; `where` it is from begins the message.

    Raises: an `error_type`.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_refuse)
    except RecursionError:
        raise error_type(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise error_type(f"{where}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise error_type(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"duplicate key {quote(key)}")
        value[key] = item
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
