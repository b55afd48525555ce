"""Regular expressions that a model's files bring along: matched only if they cannot take forever."""

from __future__ import annotations

import functools
import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from jaxllama.errors import ConfigError

_MAX_LENGTH = 1000
# Each multiplies the time by the length of a name (60), in the worst case.
_MAX_REPEATS = 4


@functools.lru_cache(maxsize=1000)
def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """The compiled pattern.

    Raises: ConfigError if it is malformed, or repeats so much that it could take forever (`(a+)+`).
    """
    if len(pattern) > _MAX_LENGTH:
        raise ConfigError(f"{where}: a pattern of {len(pattern)} characters is too long")
    try:
        tree = parser.parse(pattern)
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: {pattern!r} is not a regular expression ({error})") from None
    if _num_repeats(tree) > _MAX_REPEATS:
        raise ConfigError(f"{where}: the pattern {pattern!r} repeats too much to be matched safely")
    return compiled


def _num_repeats(tree: Any, *, inside: bool = False) -> int:
    """How many unbounded repeats; far too many where one is inside another."""
    total = 0
    for code, value in tree:
        is_repeat = code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT) and value[1] > 1
        if is_repeat:
            total += 1 + _MAX_REPEATS * inside
        elif code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            total += 1 + _MAX_REPEATS
        inner = [_num_repeats(part, inside=inside or is_repeat) for part in _parts(value)]
        # Of alternatives one after the other is tried: their times add up and do not multiply.
        total += max(inner, default=0) if code is codes.BRANCH else sum(inner)
        if is_repeat and any(item[0] in (codes.BRANCH, codes.SUBPATTERN) for item in value[2]):
            total += _MAX_REPEATS  # `(a|a)+` takes as long as a repeat inside a repeat
    return total


def _parts(value: Any) -> list[Any]:
    """The subpatterns in what the parser has to say about an element."""
    found: list[Any] = []
    for item in value if isinstance(value, tuple | list) else ():
        if isinstance(item, parser.SubPattern):
            found.append(item)
        elif isinstance(item, tuple | list):
            found += _parts(item)
    return found
