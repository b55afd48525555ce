"""What lm-eval asks of a model, asked directly: it need not be installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from jaxllama import Llama, SamplingParams
from jaxllama.errors import MissingExtraError, RequestError
from jaxllama.llama.evaluation import EvaluationModel, evaluate, register

pytestmark = pytest.mark.optimized

NAME = "divisible"
BOS = 256


@pytest.fixture(scope="module")
def llama(tokenizer_folder) -> Iterator[Llama]:
    with tiny.make_llama(tokenizer_folder=tokenizer_folder) as model:
        yield model


@pytest.fixture(scope="module")
def model(llama) -> EvaluationModel:
    return EvaluationModel(llama=llama)


@pytest.fixture(scope="module")
def encode(llama) -> Callable[[str], list[int]]:
    return llama.tokenizer.encode


def requests(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


def logprob(ids: list[int], first: int) -> float:
    """The reference's of `ids[first:]`, float64."""
    logits = tiny.reference_logits(NAME, ids)[first - 1 : -1]
    largest = logits.max(axis=1)
    chosen = logits[np.arange(len(logits)), ids[first:]]
    return float((chosen - largest - np.log(np.exp(logits - largest[:, None]).sum(axis=1))).sum())


def test_a_continuation_is_scored_after_its_context(model, encode):
    cases = [("One two", " three"), ("One two ", "three"), ("", "three"), ("x" * 120, "three")]
    encoded = [
        (encode("One two three"), 7),
        (encode("One two three"), 7),
        ([BOS, *encode("three")], 1),
        # Of what the context does not hold the beginning is left out: 96 tokens go in, and one is said after them.
        (encode("x" * 92 + "three"), 92),
    ]
    found = model.loglikelihood(requests(*cases), disable_tqdm=True)
    for (value, is_greedy), (ids, first) in zip(found, encoded, strict=True):
        assert value == pytest.approx(logprob(ids, first), abs=1e-4)
        assert isinstance(is_greedy, bool)


def test_every_token_of_a_text_is_predicted_once_after_as_much_as_fits(model, encode):
    text = "".join(chr(97 + i % 26) for i in range(230))
    ids = encode(text)
    expected = logprob([BOS, *ids[:96]], 1) + logprob(ids[95:192], 1) + logprob(ids[230 - 97 :], 97 - (230 - 192))
    assert model.loglikelihood_rolling(requests((text,), ("ab",)), disable_tqdm=True) == pytest.approx(
        [expected, logprob([BOS, *encode("ab")], 1)], abs=5e-4
    )


def test_generation_is_greedy_and_ends_where_it_was_told(model, llama):
    plain = llama.generate("Once", SamplingParams(temperature=0, max_tokens=12)).text
    stop = plain[4:6]
    options = {"until": [stop, "<|im_end|>"], "max_gen_toks": 12}
    asked = requests(("Once", options), ("Once", {"max_gen_toks": 12}), ("y" * 200, options))
    found = model.generate_until(asked, disable_tqdm=True)
    assert found[:2] == [plain[: plain.index(stop)], plain]
    sampled = model._params({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": "\n"})
    assert (sampled.temperature, sampled.top_p, sampled.max_tokens, sampled.stop) == (0.7, 0.9, 256, ("\n",))


def test_a_chat_keeps_its_template_s_tokens_and_texts_do_not_become_any(model, llama, encode):
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    text = model.apply_chat_template(messages)
    assert text == llama.chat_template.render(messages).text
    ids = llama.tokenizer.encode_rendered(llama.chat_template.render(messages))
    ((value, _),) = model.loglikelihood(requests((text, "Hello")), disable_tqdm=True)
    assert value == pytest.approx(logprob([*ids, *encode("Hello")], len(ids)), abs=1e-4)
    assert model.chat_template(True) == llama.chat_template.source
    assert model.chat_template(False) is None


def test_lm_eval_is_asked_for_by_name_and_a_place_by_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (register, lambda: evaluate(["--tasks", "hellaswag"])):
        with pytest.raises(MissingExtraError, match=r"jaxllama\[eval\]"):
            call()
    with pytest.raises(RequestError, match="place=PLACE"):
        EvaluationModel()
