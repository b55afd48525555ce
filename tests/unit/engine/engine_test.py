"""The life of a request: whatever happens around it, it ends once, rightly, and gives back what it took."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
import tiny
from collector import TIMEOUT_S, Collector, assert_idle, held, run, wait_until

from jaxllama import Engine, EngineOptions, Llama, SamplingParams
from jaxllama.errors import (
    ConfigError,
    ContextLengthError,
    EngineStoppedError,
    QueueFullError,
    RequestError,
)

CONTEXT = tiny.SMALL.max_context or 0
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
NAME = "divisible"


def prompt(length: int, seed: int = 0) -> list[int]:
    return tiny.prompt_of(NAME, length, seed)


# ---- Lengths ----


def test_max_tokens_zero_gives_no_token(llama: Llama):
    done = run(llama.engine, prompt(5), dataclasses.replace(GREEDY, max_tokens=0))
    assert (done.tokens, done.finish_reason) == ([], "length")


@pytest.mark.parametrize("max_tokens", [1, 2, 31, 32, 33, 64])
def test_max_tokens_is_exact(llama: Llama, max_tokens):
    done = run(llama.engine, prompt(5), dataclasses.replace(GREEDY, max_tokens=max_tokens))
    assert len(done.tokens) == max_tokens
    assert done.finish_reason == "length"
    tiny.assert_greedy(NAME, prompt(5), done.tokens)


@pytest.mark.parametrize("max_tokens", [None, CONTEXT, 1_000_000])
@pytest.mark.parametrize("length", [1, 50, CONTEXT - 2, CONTEXT - 1])
def test_an_output_is_cut_at_the_context(llama: Llama, length, max_tokens):
    done = run(llama.engine, prompt(length), dataclasses.replace(GREEDY, max_tokens=max_tokens))
    assert len(done.tokens) == CONTEXT - length
    assert done.finish_reason == "length"
    tiny.assert_greedy(NAME, prompt(length), done.tokens)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 5000])
def test_a_prompt_beyond_the_context_is_refused(llama: Llama, length):
    with pytest.raises(ContextLengthError, match=f"{length} tokens.*context is {CONTEXT}"):
        llama.engine.submit([1] * length, GREEDY, pytest.fail)


@pytest.mark.parametrize("ids", [[], [-1], [280], [0, 2**40], [1, 279, -5]])
def test_a_prompt_outside_the_vocabulary_is_refused(llama: Llama, ids):
    with pytest.raises(RequestError, match="prompt") as caught:
        llama.engine.submit(ids, GREEDY, pytest.fail)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("values", [{"stop_token_ids": (280,)}, {"logit_bias": {5000: 1.0}}])
def test_ids_outside_the_vocabulary_are_refused(llama: Llama, values):
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llama.engine.submit([1], SamplingParams(**values), pytest.fail)
    assert_idle(llama.engine)


def test_max_context_cannot_exceed_the_model_s():
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, max_context=10**6, num_pages=600)) as llama:
        assert llama.max_context == llama.config.max_position_embeddings


@pytest.mark.parametrize(
    "values",
    [
        {"max_rows": 0},
        {"page_size": 0},
        {"max_queue": 0},
        {"chunk_sizes": ()},
        {"chunk_sizes": (24,), "page_size": 16},
        {"chunk_sizes": (0,)},
        {"max_context": 0},
        {"max_context": -5},
        {"num_pages": -1},
        {"num_pages": 24, "max_context": 96, "page_size": 4, "chunk_sizes": (8,)},
    ],
)
def test_impossible_options_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        tiny.make_llama(options=EngineOptions(**values))


# ---- Stops ----


CHAIN = [40, 41, 42, 43, 44, 45, tiny.EOS_ID, 50, 51, 52, 53, 54, 55, 40]


@pytest.fixture(scope="module")
def scripted() -> Iterator[Engine]:
    """Says CHAIN round and round, whatever came before the last token."""
    weights = tiny.scripted_weights(NAME, dict(itertools.pairwise(CHAIN)))
    with tiny.make_llama(weights=weights) as llama:
        yield llama.engine


@pytest.mark.parametrize(
    ("values", "num_tokens", "stop_id"),
    [
        ({}, 6, tiny.EOS_ID),
        ({"ignore_eos": True}, 20, None),
        ({"stop_token_ids": (43,)}, 3, 43),
        ({"stop_token_ids": (52, 44)}, 4, 44),
        ({"stop_token_ids": (52,), "ignore_eos": True}, 9, 52),
        ({"stop_token_ids": (43,), "max_tokens": 3}, 3, 43),
        ({"stop_token_ids": (43,), "max_tokens": 2}, 2, None),
        ({"stop_token_ids": (100,) * 64, "ignore_eos": True}, 20, None),
    ],
)
def test_a_stop_id_ends_the_output_and_is_its_last_token(scripted: Engine, values, num_tokens, stop_id):
    params = dataclasses.replace(SamplingParams(temperature=0, max_tokens=20), **values)
    done = run(scripted, [3, 40], params)
    assert done.tokens == [CHAIN[1 + i % (len(CHAIN) - 1)] for i in range(num_tokens)]
    assert done.finish_reason == ("length" if stop_id is None else "stop")
    assert done.outputs[-1].stop_token_id == stop_id
    assert all(output.stop_token_id is None for output in done.outputs[:-1])


@pytest.mark.parametrize("min_tokens", [0, 5, 6, 7, 12])
def test_no_stop_id_comes_before_min_tokens(scripted: Engine, min_tokens):
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=min_tokens, stop_token_ids=(43,))
    done = run(scripted, [3, 40], params)
    assert not {43, tiny.EOS_ID} & set(done.tokens[:min_tokens])
    if min_tokens == 0:
        assert done.tokens == [41, 42, 43]
    # What comes instead of a suppressed id leads elsewhere, so the chain need not come back to it.
    assert done.finish_reason in ("stop", "length")


def test_min_tokens_spares_ordinary_tokens(scripted: Engine):
    params = SamplingParams(temperature=0, max_tokens=6, min_tokens=6, ignore_eos=True)
    assert run(scripted, [3, 40], params).tokens == CHAIN[1:7]


def test_a_model_with_many_end_of_sequence_ids_works():
    ids = list(range(100, 120))
    weights = tiny.scripted_weights(NAME, {40: 41, 41: 119, 119: 42})
    with tiny.make_llama(weights=weights, eos_token_id=ids) as llama:
        for stop_ids in ((), tuple(range(200, 264))):
            done = run(llama.engine, [40], SamplingParams(temperature=0, max_tokens=5, stop_token_ids=stop_ids))
            assert (done.tokens, done.finish_reason) == ([41, 119], "stop"), done.error


# ---- Seeds and log-probabilities ----


def test_a_request_says_its_seed_and_the_seed_repeats_it(llama: Llama):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first, second = (run(llama.engine, prompt(4), params) for _ in range(2))
    assert first.request.seed != second.request.seed
    assert 0 <= first.request.seed < 2**63
    assert first.tokens != second.tokens
    again = run(llama.engine, prompt(4), dataclasses.replace(params, seed=first.request.seed))
    assert again.request.seed == first.request.seed
    assert again.tokens == first.tokens
    assert len({first.request.id, second.request.id, again.request.id}) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 1.7, "seed": 1},
        {"top_k": 3, "top_p": 0.6, "min_p": 0.1, "seed": 2},
        {"repetition_penalty": 2.0, "logit_bias": {5: 50.0}, "temperature": 0},
    ],
)
def test_logprobs_are_of_the_model_before_everything(llama: Llama, values):
    ids, num_top = prompt(9), 7
    done = run(llama.engine, ids, SamplingParams(max_tokens=12, ignore_eos=True, logprobs=num_top, **values))
    logits = tiny.reference_logits(NAME, [*ids, *done.tokens])[len(ids) - 1 : -1]
    assert [entry.token_id for entry in done.logprobs] == done.tokens
    for row, entry in zip(logits, done.logprobs, strict=True):
        want = reference.log_probabilities(row)
        assert abs(entry.logprob - want[entry.token_id]) < 2e-5
        assert len(entry.top) == num_top
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
        np.testing.assert_allclose([value for _, value in entry.top], [want[i] for i, _ in entry.top], atol=2e-5)
        assert min(want[i] for i, _ in entry.top) >= np.sort(want)[-num_top] - 2e-5
        assert len({i for i, _ in entry.top}) == num_top


def test_rows_that_run_together_get_their_own_logprobs(llama: Llama):
    params = dataclasses.replace(GREEDY, logprobs=3)
    alone = [run(llama.engine, prompt(length), params).logprobs for length in (3, 9, 17)]
    with held(llama.engine):
        together = [Collector(llama.engine, prompt(length), params) for length in (3, 9, 17)]
    assert [done.wait().logprobs for done in together] == alone


@pytest.mark.parametrize(("logprobs", "num_top"), [(None, None), (0, 0), (1, 1), (20, 20)])
def test_there_are_as_many_logprobs_as_asked_for(llama: Llama, logprobs, num_top):
    done = run(llama.engine, prompt(3), dataclasses.replace(GREEDY, logprobs=logprobs))
    assert [len(entry.top) for entry in done.logprobs] == ([] if num_top is None else [num_top] * 8)


# ---- Queue, cancel, drain, close ----


def test_the_queue_is_bounded():
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, max_queue=3)) as llama:
        with held(llama.engine):
            waiting = [Collector(llama.engine, prompt(3), GREEDY) for _ in range(3)]
            for _ in range(3):
                with pytest.raises(QueueFullError, match="3 requests wait"):
                    llama.engine.submit(prompt(3), GREEDY, pytest.fail)
            assert llama.engine.stats().num_waiting == 3
        assert all(len(done.wait().tokens) == 8 for done in waiting)
        run(llama.engine, prompt(3), GREEDY)


def test_requests_beyond_the_rows_wait_their_turn(llama: Llama):
    done = [Collector(llama.engine, prompt(3, seed), GREEDY) for seed in range(25)]
    for seed, collector in enumerate(done):
        assert len(collector.wait().tokens) == 8
        tiny.assert_greedy(NAME, prompt(3, seed), collector.tokens)
    assert_idle(llama.engine)


def test_requests_are_admitted_by_priority_then_arrival():
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, max_rows=1)) as llama:
        order: list[str] = []
        with held(llama.engine):
            submitted = [("late", 5), ("first", -1), ("second", 0), ("third", 0), ("early late", 4)]
            for name, priority in submitted:
                llama.engine.submit(
                    prompt(3),
                    GREEDY,
                    lambda output, name=name: order.append(name) if output.finish_reason else None,  # type: ignore[misc]
                    priority=priority,
                )
        assert llama.engine.drain(TIMEOUT_S)
        assert wait_until(lambda: len(order) == 5)
    assert order == ["first", "second", "third", "early late", "late"]


def test_cancel_frees_the_row_and_its_pages(engine: Engine):
    done = Collector(engine, prompt(20), SamplingParams(ignore_eos=True, max_tokens=70)).wait_for_first()
    done.request.cancel()
    done.request.cancel()
    done.wait()
    assert done.finish_reason == "cancelled"
    assert_idle(engine)


def test_cancel_takes_effect_within_a_dispatch(engine: Engine):
    """While the callback runs nothing but the dispatches already launched can still be on their way."""
    cancelled = threading.Event()
    outputs: list[Any] = []

    def on_output(output: Any) -> None:
        outputs.append(output)
        if len(outputs) == 1:
            request_box[0].cancel()
            cancelled.set()

    request_box: list[Any] = []
    with held(engine):
        request_box.append(engine.submit(prompt(3), SamplingParams(ignore_eos=True), on_output))
    assert cancelled.wait(TIMEOUT_S)
    assert wait_until(lambda: outputs[-1].finish_reason is not None)
    assert outputs[-1].finish_reason == "cancelled"
    assert len(outputs) <= 4
    assert_idle(engine)


def test_a_waiting_request_can_be_cancelled(engine: Engine):
    with held(engine):
        waiting = [Collector(engine, prompt(3), GREEDY) for _ in range(6)]
        for done in waiting[1::2]:
            done.request.cancel()
    assert [done.wait().finish_reason for done in waiting] == ["length", "cancelled"] * 3
    assert all(not done.tokens for done in waiting[1::2])
    assert_idle(engine)


def test_cancel_after_the_end_does_nothing(engine: Engine):
    done = run(engine, prompt(3), GREEDY)
    done.request.cancel()
    assert run(engine, prompt(3), GREEDY).tokens == done.tokens
    assert [output.finish_reason for output in done.outputs if output.finish_reason] == ["length"]


def test_a_row_that_follows_a_cancelled_one_is_not_touched_by_it(engine: Engine):
    """The cancelled row's dispatch is still in flight when its row and pages go to the next request."""
    want = run(engine, prompt(30, 1), GREEDY).tokens
    for _ in range(8):
        doomed = [Collector(engine, prompt(30), SamplingParams(ignore_eos=True, seed=i)) for i in range(4)]
        doomed[-1].wait_for_first()
        for done in doomed:
            done.request.cancel()
        followers = [Collector(engine, prompt(30, 1), GREEDY) for _ in range(4)]
        assert [done.wait().tokens for done in followers] == [want] * 4
    assert_idle(engine)


def test_drain_finishes_what_was_accepted_and_takes_no_more(engine: Engine):
    accepted = [Collector(engine, prompt(3, seed), GREEDY) for seed in range(9)]
    assert engine.drain(TIMEOUT_S)
    assert all(len(done.wait().tokens) == 8 for done in accepted)
    with pytest.raises(EngineStoppedError, match="stopping"):
        engine.submit(prompt(3), GREEDY, pytest.fail)
    assert engine.drain(0.1)


def test_drain_returns_when_the_last_output_has_been_delivered(engine: Engine):
    delivered = threading.Event()

    def slow(output: Any) -> None:
        if output.finish_reason is not None:
            time.sleep(0.3)
            delivered.set()

    engine.submit(prompt(3), GREEDY, slow)
    assert engine.drain(TIMEOUT_S)
    assert delivered.is_set()


def test_drain_gives_up_in_time(engine: Engine):
    with held(engine):
        waiting = Collector(engine, prompt(3), GREEDY)
        started = time.monotonic()
        assert not engine.drain(0.2)
        assert time.monotonic() - started < TIMEOUT_S
    assert len(waiting.wait().tokens) == 8


def test_close_ends_every_request_once():
    with tiny.make_llama() as llama:
        params = SamplingParams(ignore_eos=True)
        running = [Collector(llama.engine, prompt(3, seed), params) for seed in range(12)]
        running[0].wait_for_first()
        llama.engine.close()
        assert {done.wait().finish_reason for done in running} <= {"cancelled", "length"}
        assert running[-1].finish_reason == "cancelled"
        llama.engine.close()
        with pytest.raises(EngineStoppedError):
            llama.engine.submit(prompt(3), GREEDY, pytest.fail)


def test_an_engine_that_never_ran_can_be_closed():
    llama = tiny.make_llama()
    llama.close()
    llama.close()


def test_close_from_a_callback_does_not_deadlock():
    llama = tiny.make_llama()
    closed = threading.Event()

    def on_output(_: Any) -> None:
        llama.engine.close()
        closed.set()

    llama.engine.submit(prompt(3), GREEDY, on_output)
    assert closed.wait(TIMEOUT_S)
    llama.close()
