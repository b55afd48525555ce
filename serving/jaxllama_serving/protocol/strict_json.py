"""JSON as this server accepts it: stricter than Python's, and bounded before anything is built."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from jaxllama.errors import quote
from jaxllama_serving.protocol.errors import ApiError, invalid

MAX_DEPTH = 32
MAX_INT_DIGITS = 40
"""Longer integers are refused unread: the conversion is quadratic, and no field takes one."""
PREFIX_BYTES = 4096

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_ROUND = bytes.maketrans(b"[]{}", b"()()")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def decode(body: bytes) -> dict[str, Any]:
    """Returns the object that `body` spells.

    Refuses what the json module would let pass: NaN and infinities (also `1e999`), duplicate keys, lone surrogates,
    nesting deeper than `MAX_DEPTH`, integers longer than `MAX_INT_DIGITS` and any encoding but UTF-8.

    Raises: ApiError, status 400.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_json(f"the body is not UTF-8 (byte {error.start})") from None
    _check_depth(body)
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        raise _bad_json(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError):
        raise _bad_json("a number or a level of nesting is out of bounds") from None
    if not isinstance(value, dict):
        raise _bad_json("the body must be an object")
    # Well-formed UTF-8 holds no surrogate; only an escape can make one.
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value, "")
    return value


def _bad_json(reason: str, param: str | None = None) -> ApiError:
    return invalid(f"The body is not valid JSON: {reason}.", param, "invalid_json")


def _check_depth(body: bytes) -> None:
    # The start first: what is nested too deep there need not be read to its end.
    depth = 0
    for bracket in _brackets(body[:PREFIX_BYTES]):
        depth += 1 if bracket == ord("(") else -1
        if depth > MAX_DEPTH:
            raise _bad_json(f"it is nested deeper than {MAX_DEPTH} levels")
    # Whole-buffer operations instead of a loop over bytes: each `replace` peels one level of nesting off everything.
    brackets = _brackets(body)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"()", b"")
    if brackets:
        raise _bad_json(f"brackets do not match, or are nested deeper than {MAX_DEPTH} levels")


def _brackets(body: bytes) -> bytes:
    """The brackets outside strings, all made round."""
    pieces = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    return b"".join(pieces[::2]).translate(_AS_ROUND, _NOT_BRACKETS)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _bad_json(f"the key {quote(key)} appears twice in one object")
            seen.add(key)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise _bad_json(f"an integer has {len(digits)} digits, at most {MAX_INT_DIGITS} are allowed")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _bad_json(f"the number {quote(text)} is too large")
    return value


def _constant(name: str) -> float:
    raise _bad_json(f"{name} is not a JSON number")


def _check_surrogates(value: Any, path: str) -> None:
    if isinstance(value, str):
        if not _is_unicode(value):
            raise _bad_json(f"{path or 'the body'} holds half of a surrogate pair", path or None)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_surrogates(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _is_unicode(key):
                raise _bad_json("a key holds half of a surrogate pair", path or None)
            _check_surrogates(item, f"{path}.{key}" if path else key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
