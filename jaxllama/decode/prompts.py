"""What may be given as prompts: a text, token ids, or a list of either. No JAX."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxllama.decode.params import SamplingParams
from jaxllama.errors import RequestError, quote

type Prompt = str | Sequence[int]

_EXPECTED = "a text or a list of token ids"


def read_prompts(prompts: Any) -> tuple[list[str | list[int]], bool]:
    """Each prompt as a text or a list of ids, and whether one was given and not a list of them.

    Arrays of integers are lists of ids, or of rows of them. An empty list is no prompts.

    Raises: RequestError saying what was expected, and what is there instead.
    """
    if isinstance(prompts, str):
        return [prompts], True
    items = _items(prompts, f"{_EXPECTED}, or a list of such prompts", "prompt")
    are_ids = [_is_id(item) for item in items]
    if items and all(are_ids):
        return [token_ids(items, "prompt")], True
    if any(are_ids):
        index = are_ids.index(False)
        raise RequestError(
            f"prompt: item {index} is {quote(items[index])} among token ids; a list holds ids or prompts, not both",
            "prompt",
        )
    return [read_prompt(item, f"prompt {i}") for i, item in enumerate(items)], False


def read_prompt(prompt: Any, what: str = "prompt") -> str | list[int]:
    """One prompt. `what` is its name in messages.

    Raises: RequestError.
    """
    return prompt if isinstance(prompt, str) else token_ids(prompt, what, _EXPECTED)


def token_ids(ids: Any, what: str, expected: str = "a list of integer token ids") -> list[int]:
    """`ids` as Python integers; whether a model has them is for others to say.

    Raises: RequestError.
    """
    items = _items(ids, expected, what)
    for index, item in enumerate(items):
        if not _is_id(item):
            raise RequestError(f"{what} must be {expected}; item {index} is {quote(item)}", what.split()[0])
    return [operator.index(item) for item in items]


def read_params(params: Any, num_prompts: int) -> list[SamplingParams]:
    """The parameters of each prompt: the default's, one for all, or one for each.

    Raises: RequestError.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    each = list(params) if isinstance(params, Iterable) and not isinstance(params, str | bytes | dict) else [params]
    for item in each:
        if not isinstance(item, SamplingParams):
            raise RequestError(f"params must be SamplingParams, or a list of them, got {quote(item)}", "params")
    if len(each) != num_prompts:
        raise RequestError(
            f"params: {len(each)} for {num_prompts} prompts; give one for all, or one for each", "params"
        )
    return each


def _items(value: Any, expected: str, what: str) -> list[Any]:
    """The items of a list, a tuple, an array or another sequence that is no text or bytes."""
    if isinstance(value, bytes | bytearray | memoryview):
        got = f"{type(value).__name__}; decode them to a text first"
    elif hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim and (not array.size or array.dtype.kind in "iuOUT"):
            return list(array) if array.ndim > 1 else array.tolist()
        got = f"an array of {array.dtype.name} with the shape {array.shape}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    else:
        got = f"{type(value).__name__}: {quote(value)}"
    raise RequestError(f"{what} must be {expected}; got {got}", what.split()[0])


def _is_id(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
