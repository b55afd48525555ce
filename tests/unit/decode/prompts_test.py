"""What is no prompt is refused by name, and nothing else is."""

from __future__ import annotations

import collections
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllama import Llama, SamplingParams
from jaxllama.decode.prompts import read_params, read_prompt, read_prompts
from jaxllama.errors import RequestError

GOOD: list[tuple[Any, tuple[list[str | list[int]], bool]]] = [
    ("text", (["text"], True)),
    ("", ([""], True)),
    ([1, 2], ([[1, 2]], True)),
    ((1, np.int32(2)), ([[1, 2]], True)),
    (range(3), ([[0, 1, 2]], True)),
    (np.array([3, 4], np.uint16), ([[3, 4]], True)),
    (jnp.array([3, 4]), ([[3, 4]], True)),
    ([jnp.int32(3), 4], ([[3, 4]], True)),
    (np.array([[3, 4], [5, 6]]), ([[3, 4], [5, 6]], False)),
    ([np.array([3]), (4,), "x"], ([[3], [4], "x"], False)),
    (np.array(["a", "b"]), (["a", "b"], False)),
    (np.array(["a", [1, 2]], object), (["a", [1, 2]], False)),
    (collections.deque([[1], "a"]), ([[1], "a"], False)),
    (["a"], (["a"], False)),
    ([], ([], False)),
    ([[]], ([[]], False)),
]


@pytest.mark.parametrize(("prompts", "want"), GOOD, ids=lambda value: type(value).__name__)
def test_a_text_ids_or_a_list_of_either_is_read(prompts, want):
    read = read_prompts(prompts)
    assert read == want
    assert all(type(item) is int for prompt in read[0] if not isinstance(prompt, str) for item in prompt)


BAD: list[tuple[Any, str]] = [
    (b"abc", "got bytes; decode"),
    (bytearray(b"abc"), "got bytearray; decode"),
    (memoryview(b"abc"), "got memoryview; decode"),
    ({"a": 1}, "got dict"),
    ({1, 2}, "got set"),
    (frozenset({1}), "got frozenset"),
    (None, "got NoneType"),
    (7, "got int"),
    (1.5, "got float"),
    (True, "got bool"),
    ((i for i in (1, 2)), "got generator"),
    (object(), "got object"),
    (np.array([1.0, 2.0]), "an array of float64 with the shape (2,)"),
    (np.array([True]), "an array of bool"),
    (np.int32(3), "an array of int32 with the shape ()"),
    (np.array(3), "an array of int64 with the shape ()"),
    (jnp.array([1.0]), "an array of float32"),
    (np.zeros((2, 2)), "an array of float64"),
    (np.zeros((1, 1, 1), np.int32), "item 0 is"),
    ([1, "a"], "item 1 is 'a' among token ids"),
    (["a", 1], "item 0 is 'a' among token ids"),
    ([1, 2.0], "item 1 is 2.0 among token ids"),
    ([True, False], "got bool"),
    ([1.0], "prompt 0 must be"),
    ([b"a"], "got bytes"),
    ([None], "got NoneType"),
    ([{"role": "user"}], "got dict"),
    ([[1, "a"]], "prompt 0 must be a text or a list of token ids; item 1 is 'a'"),
    (["a", [1, None]], "prompt 1 must be"),
    ([["a"]], "item 0 is 'a'"),
    ([[[1]]], "item 0 is [1]"),
    ([np.array([1.5])], "an array of float64"),
]


@pytest.mark.parametrize(("prompts", "reason"), BAD, ids=lambda value: type(value).__name__)
def test_what_is_no_prompt_is_refused(prompts, reason):
    with pytest.raises(RequestError) as caught:
        read_prompts(prompts)
    assert reason in str(caught.value)
    assert caught.value.param == "prompt"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("prompt", [[[1]], ["a"], b"a", None, {"a": 1}, [1.0]])
def test_one_prompt_is_one(prompt):
    with pytest.raises(RequestError, match="a text or a list of token ids"):
        read_prompt(prompt)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
_NESTED = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner))


@given(_NESTED)
def test_anything_is_read_or_refused(value):
    try:
        prompts, is_one = read_prompts(value)
    except RequestError:
        return
    assert not is_one or len(prompts) == 1
    for prompt in prompts:
        assert isinstance(prompt, str) or all(type(item) is int for item in prompt)


@pytest.mark.parametrize("params", [{"temperature": 1.0}, [None], "hot", 3, [{"top_p": 1}], b"x"])
def test_what_are_no_parameters_is_refused(params):
    with pytest.raises(RequestError, match="must be SamplingParams"):
        read_params(params, 1)


def test_parameters_are_for_all_or_one_for_each():
    hot = SamplingParams(temperature=2.0)
    assert read_params(None, 2) == [SamplingParams()] * 2
    assert read_params(hot, 2) == [hot, hot]
    assert read_params((hot, SamplingParams()), 2) == [hot, SamplingParams()]
    with pytest.raises(RequestError, match="1 for 2 prompts"):
        read_params([hot], 2)


def test_every_way_into_the_model_refuses_them(llama: Llama):
    for call in (llama.generate, llama.stream, llama.logits, llama.prompt_logprobs):
        for bad in (b"abc", {"a": 1}, np.array([1.5])):
            with pytest.raises(RequestError):
                call(bad)  # type: ignore[operator]
    for way in (llama.generate, llama.stream, llama.chat):
        with pytest.raises(RequestError, match="SamplingParams"):
            way([1], {"temperature": 0})  # type: ignore[operator]
