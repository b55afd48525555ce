"""Steering: one row's residual stream is changed as a patch would, and nothing else in any bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

from jaxllama import Llama, SamplingParams
from jaxllama.decode.steering import Steering
from jaxllama.errors import RequestError
from jaxllama.model.dense import Patch

pytestmark = pytest.mark.optimized

NAME = "divisible"
WIDTH = tiny.MODELS[NAME]["hidden_size"]
PROMPTS = [tiny.prompt_of(NAME, 5 + 3 * i, i) for i in range(8)]
PARAMS = SamplingParams(temperature=1, seed=3, max_tokens=16, ignore_eos=True, logprobs=3)
GREEDY = replace(PARAMS, temperature=0)


def vector(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


@pytest.fixture(scope="module")
def wide():
    """A model with a row for each of eight prompts."""
    with tiny.make_llama(options=replace(tiny.SMALL, max_rows=8)) as llama:
        yield llama


def test_a_steered_reply_is_that_of_a_forward_pass_with_the_vector_added(llama: Llama):
    prompt = PROMPTS[3]
    said = llama.generate(prompt, replace(GREEDY, steering=Steering(0, vector(), 1.5)))
    assert said.token_ids != llama.generate(prompt, GREEDY).token_ids
    ids = [*prompt, *said.token_ids[:-1]]
    places = tuple(range(len(prompt) - 1, len(ids)))
    patch = Patch("resid_post", 0, 1.5 * vector(), positions=places, mode="add")
    logits = np.asarray(llama.forward([ids], patches=[patch])[0], np.float64)[len(prompt) - 1 :]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert logits.argmax(axis=1).tolist() == list(said.token_ids)
    found = [token.logprob for token in said.logprobs]
    np.testing.assert_allclose(found, logprobs[np.arange(len(found)), said.token_ids], atol=1e-4)


def test_zeros_change_no_bit_and_seven_neighbours_keep_theirs(wide: Llama):
    plain = wide.generate(PROMPTS, PARAMS)
    for steering in (Steering(1, np.zeros(WIDTH)), Steering(1, vector(), 0.0)):
        assert wide.generate(PROMPTS, replace(PARAMS, steering=steering)) == plain
    each = [PARAMS] * 8
    each[5] = replace(PARAMS, steering=Steering(0, vector(), 2.0))
    steered = wide.generate(PROMPTS, each)
    assert steered[:5] + steered[6:] == plain[:5] + plain[6:]
    assert steered[5].token_ids != plain[5].token_ids
    # Alone, beside others, and beside another vector in the row next to it: the same reply.
    each[4] = replace(PARAMS, steering=Steering(1, vector(7), 3.0))
    assert wide.generate(PROMPTS, each)[5] == wide.generate(PROMPTS[5], each[5]) == steered[5]


def test_a_new_vector_compiles_nothing(wide: Llama):
    for steering in (None, Steering(0, vector())):
        wide.generate(PROMPTS[0], replace(PARAMS, steering=steering))
    before = wide.engine.stats().num_compilations
    for seed, layer in ((1, 0), (2, 1)):
        wide.generate(PROMPTS[0], replace(PARAMS, steering=Steering(layer, vector(seed))))
    wide.generate(PROMPTS[0], PARAMS)
    assert wide.engine.stats().num_compilations == before


def test_what_a_steered_row_wrote_is_not_found_again():
    with tiny.make_llama() as llama:
        said = llama.generate(PROMPTS[2], replace(GREEDY, steering=Steering(0, vector(), 2.0)))
        longer = [*PROMPTS[2], *said.token_ids]
        before = llama.engine.stats().num_prompt_tokens_cached
        again = llama.generate(longer, GREEDY)
        # The pages of the prompt alone, less the last token, which was decoded.
        found = llama.engine.stats().num_prompt_tokens_cached - before
        assert found <= (len(PROMPTS[2]) - 1) // 4 * 4
    with tiny.make_llama() as fresh:
        assert fresh.generate(longer, GREEDY) == again


def test_one_that_is_set_aside_goes_on_as_it_was():
    each = [replace(PARAMS, max_tokens=50, steering=Steering(i % 2, vector(i))) for i in range(4)]
    with tiny.make_llama() as llama:
        plain = llama.generate(PROMPTS[:4], each)
    with tiny.make_llama(options=replace(tiny.SMALL, num_pages=33)) as llama:
        assert llama.generate(PROMPTS[:4], each) == plain


def test_what_cannot_be_is_refused_by_name(llama: Llama):
    def generate(steering: Steering) -> None:
        llama.generate([1, 2], SamplingParams(steering=steering))

    bad = (
        (lambda: Steering(0, "north"), "must be numbers"),
        (lambda: Steering(0, np.zeros((2, WIDTH))), r"shape \(2, 52\)"),
        (lambda: Steering(0, np.full(WIDTH, np.nan)), "all finite"),
        (lambda: Steering(-1, vector()), "0 or more"),
        (lambda: SamplingParams(steering=vector()), "must be a Steering"),
        (
            lambda: llama.generate([1, 2], SamplingParams(steering=Steering(2, vector()))),
            "no layer 2; there are 0 to 1",
        ),
        (
            lambda: llama.generate([1, 2], SamplingParams(steering=Steering(0, vector()[:9]))),
            "9 numbers, expected hidden",
        ),
    )
    for call, message in bad:
        with pytest.raises(RequestError, match=message) as error:
            call()
        assert error.value.param == "steering"
