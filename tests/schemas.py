"""Random JSON schemas, of the keywords that people use."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_schema(rng: np.random.Generator, depth: int = 0) -> dict[str, Any]:
    """A schema that something satisfies; nested at most four levels."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    if depth < 4:
        kinds += ["object", "object", "array", "tuple", "anyOf", "ref"]
    kind = "object" if depth == 0 else str(rng.choice(kinds))
    return _MAKERS[kind](rng, depth)


def _object(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    names = rng.permutation(["a", "name", "größe", 'quo"te', "x-y", "z z"])[: rng.integers(1, 5)].tolist()
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": names[: rng.integers(0, len(names) + 1)],
        "additionalProperties": False,
    }


def _array(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    low = int(rng.integers(0, 3))
    return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 2}


def _tuple(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    items = [random_schema(rng, depth + 1) for _ in range(2)]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}


def _ref(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    inner = random_schema(rng, 5)
    return {"anyOf": [inner, {"type": "null"}]}


def _integer(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    low = int(rng.integers(-1000, 1000))
    return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 500))}


def _number(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"type": "number", "minimum": -1.5, "maximum": float(rng.integers(0, 9)) + 0.25}


def _string(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    low = int(rng.integers(0, 4))
    return {"type": "string", "minLength": low, "maxLength": low + int(rng.integers(0, 12))}


def _pattern(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": str(rng.choice(["^[A-Z]{2}[0-9]+$", "^a|b$", "^(x|y)*z$", "[0-9]{3}"]))}


_MAKERS = {
    "object": _object,
    "array": _array,
    "tuple": _tuple,
    "ref": _ref,
    "anyOf": lambda rng, depth: {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]},
    "string": _string,
    "pattern": _pattern,
    "integer": _integer,
    "number": _number,
    "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
    "enum": lambda rng, depth: {"enum": ["a", 1, None, "b c", True, [1, {"k": "v"}]][: rng.integers(1, 7)]},
    "const": lambda rng, depth: {"const": {"fixed": [1.5, "é\n"]}},
}
