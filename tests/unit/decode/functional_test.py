"""Decoding as pure functions: what the engine says, copied, taken back, steered by hand and by a function."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllama import Llama, SamplingParams, functional
from jaxllama.errors import ConfigError, ContextLengthError, RequestError

pytestmark = pytest.mark.optimized

NAME = "divisible"
PROMPTS = [tiny.prompt_of(NAME, 20, 1), tiny.prompt_of(NAME, 7, 2)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.0, seed=5, presence_penalty=0.5)
FORBIDDEN = 212


@pytest.fixture(scope="module")
def model(llama) -> functional.Model:
    return functional.Model.of(llama)


def begin(model: functional.Model, params: Any = GREEDY, prompts: Any = PROMPTS) -> functional.Decoding:
    return functional.start(model, prompts, params, max_context=64)


def said(decoding: functional.Decoding, row: int = 0, prompt: Any = PROMPTS[0]) -> list[int]:
    return functional.tokens(decoding, row)[len(prompt) :]


def test_rows_say_what_the_engine_says(llama: Llama, model):
    decoding = begin(model, [GREEDY, DRAWN])
    for num_steps in (5, 3, 20):  # more than the budget
        decoding = functional.steps(model, decoding, num_steps)
    expected = llama.generate(PROMPTS, [GREEDY, DRAWN])
    for row, (prompt, completion) in enumerate(zip(PROMPTS, expected, strict=True)):
        assert functional.tokens(decoding, row) == [*prompt, *completion.token_ids]
    assert not decoding.state.rows.active.any()


def test_tokens_chosen_by_hand_are_those_of_steps_and_all_of_it_can_be_jitted(llama: Llama, model):
    def greedily(model: functional.Model, decoding: functional.Decoding) -> functional.Decoding:
        def once(_: Any, decoding: functional.Decoding) -> functional.Decoding:
            decoding, logits = functional.advance(model, decoding)
            return functional.push(decoding, jnp.argmax(logits, axis=1))

        return jax.lax.fori_loop(0, 12, once, decoding)

    decoding = jax.jit(greedily)(model, begin(model))
    for row, completion in enumerate(llama.generate(PROMPTS, GREEDY)):
        assert said(decoding, row, PROMPTS[row]) == list(completion.token_ids)


def test_a_copy_says_the_same_and_what_is_taken_back_is_said_again(model):
    decoding = functional.steps(model, begin(model, DRAWN), 6)
    copied = functional.fork(model, decoding, [0, 0])
    whole = functional.steps(model, copied, 6)
    assert functional.tokens(whole, 0) == functional.tokens(whole, 1)
    said = functional.tokens(whole, 0)
    back = functional.rewind(whole, 1, 8)
    assert functional.tokens(back, 1) == said[:-8]
    assert functional.tokens(functional.steps(model, back, 8), 1) == said


def test_parameters_change_on_the_way(llama: Llama, model):
    decoding = functional.steps(model, begin(model), 4)
    decoding = functional.set_params(model, decoding, 0, replace(GREEDY, logit_bias={FORBIDDEN: 100.0}))
    decoding = functional.steps(model, decoding, 8)
    first = list(llama.generate(PROMPTS[0], GREEDY).token_ids[:4])
    assert said(decoding) == first + [FORBIDDEN] * 8


def forbid(logits: Any, state: Any) -> Any:
    """The token never comes."""
    return logits.at[:, FORBIDDEN].set(-jnp.inf)


def guided(logits: Any, state: Any) -> Any:
    """Classifier-free guidance: row 0 away from what row 1, without the condition, would say. Both say the same.

    Source: Sanchez et al. 2023, arXiv:2306.17806.
    """
    logprobs = jax.nn.log_softmax(logits)
    return jnp.broadcast_to(logprobs[1] + 1.5 * (logprobs[0] - logprobs[1]), logits.shape)


def contrasted(logits: Any, state: Any) -> Any:
    """Contrastive decoding: of what row 0 finds likely, what row 1, the amateur, does not.

    Source: Li et al. 2022, arXiv:2210.15097.
    """
    expert, amateur = jax.nn.log_softmax(logits)
    is_likely = expert >= jnp.log(0.1) + expert.max()
    return jnp.broadcast_to(jnp.where(is_likely, expert - amateur, -jnp.inf), logits.shape)


def watermarked(logits: Any, state: Any) -> Any:
    """Half of the vocabulary, by the token before, is a little likelier.

    Source: Kirchenbauer et al. 2023, arXiv:2301.10226.
    """
    return logits + 4.0 * jax.vmap(lambda last: green(last, logits.shape[1]))(state.rows.last_token)


def green(last: Any, vocab_size: int) -> Any:
    return jax.random.bernoulli(jax.random.fold_in(jax.random.key(7), last), 0.5, (vocab_size,))


def test_a_processor_is_compiled_into_the_loop(llama: Llama, model):
    plain = functional.steps(model, begin(model), 12)
    assert FORBIDDEN in said(plain) or FORBIDDEN in said(plain, 1, PROMPTS[1])
    without = functional.steps(model, begin(model), 12, logits_processor=forbid)
    for row, prompt in enumerate(PROMPTS):
        assert FORBIDDEN not in said(without, row, prompt)
        expected = llama.generate(prompt, replace(GREEDY, logit_bias={FORBIDDEN: -100.0}))
        assert said(without, row, prompt) == list(expected.token_ids)
    for processor in (guided, contrasted):
        both = functional.steps(model, begin(model), 12, logits_processor=processor)
        mixed = said(both)
        assert mixed == said(both, 1, PROMPTS[1])
        logits = [llama.logits([*prompt, *mixed[:-1]])[len(prompt) - 1 :] for prompt in PROMPTS]
        for place in range(12):
            offered = processor(jnp.stack([logits[0][place], logits[1][place]]), None)[0]
            assert float(offered.max() - offered[mixed[place]]) < 1e-3
    marked = functional.tokens(functional.steps(model, begin(model, DRAWN), 12, logits_processor=watermarked), 0)
    pairs = itertools.pairwise(marked[19:])
    assert sum(bool(green(last, 280)[token]) for last, token in pairs) >= 10


def beam_search(
    model: functional.Model, prompt: list[int], num_beams: int, num_tokens: int
) -> list[tuple[float, list[int]]]:
    """The `num_beams` likeliest continuations of `num_tokens` tokens that a beam finds, with log-probabilities."""

    @jax.jit
    def extend(model: functional.Model, decoding: functional.Decoding, scores: Any) -> Any:
        decoding, logits = functional.advance(model, decoding)
        totals = scores[:, None] + jax.nn.log_softmax(logits)
        scores, best = jax.lax.top_k(totals.ravel(), num_beams)
        beams, chosen = jnp.divmod(best, logits.shape[1])
        return functional.push(functional.fork(model, decoding, beams), chosen), scores

    params = SamplingParams(temperature=0, ignore_eos=True)
    decoding = functional.start(model, [prompt] * num_beams, params, max_context=len(prompt) + num_tokens + 1)
    # All beams are the same at first: the best of one alone may go on.
    scores = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)
    for _ in range(num_tokens):
        decoding, scores = extend(model, decoding, scores)
    return [(float(score), functional.tokens(decoding, row)[len(prompt) :]) for row, score in enumerate(scores)]


def test_a_beam_search_finds_what_trying_all_finds(llama: Llama, model):
    prompt = PROMPTS[1]
    found = beam_search(model, prompt, num_beams=3, num_tokens=2)
    first = np.asarray(jax.nn.log_softmax(llama.logits(prompt)[-1]))
    kept = np.argsort(first)[::-1][:3]
    second = np.asarray(jax.nn.log_softmax(llama.forward([[*prompt, int(token)] for token in kept])[:, -1]))
    totals = first[kept][:, None] + second
    best = np.argsort(totals.ravel())[::-1][:3]
    assert [ids for _, ids in found] == [[int(kept[i // 280]), int(i % 280)] for i in best]
    np.testing.assert_allclose([score for score, _ in found], np.sort(totals.ravel())[::-1][:3], atol=1e-4)


def test_what_cannot_be_is_refused(model):
    with pytest.raises(RequestError, match="prompt 1 must be ids from 0 to 279"):
        begin(model, prompts=[[1], [280]])
    with pytest.raises(ContextLengthError, match="a row holds 64"):
        begin(model, prompts=[[1] * 64])
    with tiny.make_llama(data=2) as spread, pytest.raises(ConfigError, match="one shard"):
        functional.Model.of(spread)
