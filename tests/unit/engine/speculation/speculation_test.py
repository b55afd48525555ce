"""Speculation changes the time that an answer takes and no bit of it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest
import tiny
from collector import Collector, assert_idle, held, run, watch_saved_pages

from jaxllama import EngineOptions, Llama, SamplingParams
from jaxllama.engine.options import StepReport
from jaxllama.engine.scheduling.speculation import StepTimes
from jaxllama.errors import ConfigError, RequestError
from jaxllama.model import native

pytestmark = pytest.mark.optimized

SMALL = dataclasses.replace(tiny.SMALL, max_context=136, num_pages=4 * 34 + 1)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 1.0},
    {"temperature": 1.6, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 12, "min_p": 0.01},
    {"temperature": 1.0, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"temperature": 1.0, "min_tokens": 9, "ignore_eos": False},
    {"temperature": 0, "logprobs": None},
    {"temperature": 1.2, "logprobs": 20},
]
type Request = tuple[list[int], SamplingParams]


def repeating_requests(vocab_size: int) -> list[Request]:
    """Prompts that repeat themselves, and a bias that makes many answers go on with it; all kinds of sampling."""
    rng = random.Random(4)
    requests = []
    for i in range(18):
        phrase = [rng.randrange(vocab_size) for _ in range(rng.choice([1, 2, 4, 6]))]
        prompt = [*(rng.randrange(vocab_size) for _ in range(rng.choice([0, 1, 30, 60]))), *phrase * 5]
        bias = dict.fromkeys(phrase, 7.0) if i % 3 else {}
        stops = {"stop_token_ids": tuple(phrase[-1:]) if i % 5 == 4 else ()}
        values = {"logprobs": 3, "ignore_eos": True, "seed": i, "max_tokens": rng.choice([1, 20, 40, 40])}
        requests.append((prompt, SamplingParams(logit_bias=bias, **values | stops | KINDS[i % len(KINDS)])))
    return requests


def make_model(name: str, dtype: str, options: EngineOptions, quantize: str | None = None) -> Llama:
    llama = tiny.make_llama(name, dtype=jnp.dtype(dtype), quantize=quantize, options=options)
    # Drafts always pay.
    free = StepTimes({1: 1.0, 4: 1.0}, {1: 0.1, 32: 0.05})
    llama.engine._speculation.times = dict.fromkeys(llama.engine._row_buckets, free)
    return llama


def outcomes(llama: Llama, requests: list[Request], scope: str, *, at_once: bool) -> list[Any]:
    if at_once:
        with held(llama.engine):
            got = [Collector(llama.engine, *request, cache_scope=scope) for request in requests]
    else:
        got = [Collector(llama.engine, *request, cache_scope=scope).wait() for request in requests]
    return [(done.wait().tokens, done.logprobs, done.finish_reason) for done in got]


@pytest.mark.parametrize(
    ("name", "dtype", "kv_dtype", "quantize"),
    [
        ("smollm2_like", "bfloat16", None, None),
        pytest.param("divisible", "float32", None, None, marks=pytest.mark.slow),
        pytest.param("divisible", "bfloat16", "int8", None, marks=pytest.mark.slow),
        pytest.param("smollm2_like", "float32", None, "int8", marks=pytest.mark.slow),
    ],
)
def test_speculation_changes_no_bit(name, dtype, kv_dtype, quantize, monkeypatch):
    """Tokens, log-probabilities and ends: alone, together, from the cache, and set aside."""
    requests = repeating_requests(tiny.config_of(name).vocab_size)
    options = dataclasses.replace(SMALL, kv_dtype=kv_dtype)
    with make_model(name, dtype, options, quantize) as plain:
        want = outcomes(plain, requests, "", at_once=True)
    assert {reason for *_, reason in want} == {"stop", "length"}
    reports: list[StepReport] = []
    with make_model(name, dtype, dataclasses.replace(options, speculation="lookup"), quantize) as model:
        assert model.engine.platform.programs_agree
        model.engine.on_steps = reports.append
        assert outcomes(model, requests, "alone", at_once=False) == want
        assert outcomes(model, requests, "", at_once=True) == want
        assert outcomes(model, requests, "", at_once=True) == want
        assert_idle(model.engine)
    assert sum(report.num_accepted for report in reports) > 100
    assert sum(report.num_drafted - report.num_accepted for report in reports) > 100
    saved = watch_saved_pages(monkeypatch)
    few = dataclasses.replace(options, speculation="lookup", num_pages=36, dispatch_s=1e-6)
    with make_model(name, dtype, few, quantize) as model:
        assert outcomes(model, requests, "", at_once=True) == want
        assert_idle(model.engine)
    assert saved


@pytest.mark.slow
def test_where_programs_differ_in_bits_an_answer_depends_on_its_request_alone(monkeypatch):
    """All rows always run the program that verifies, whoever runs beside them."""
    monkeypatch.setattr(native, "is_available", lambda: False)
    requests = repeating_requests(tiny.config_of("smollm2_like").vocab_size)
    with make_model("smollm2_like", "float32", dataclasses.replace(SMALL, speculation="lookup")) as model:
        assert not model.engine.platform.programs_agree
        reports: list[StepReport] = []
        model.engine.on_steps = reports.append
        want = outcomes(model, requests, "alone", at_once=False)
        assert outcomes(model, requests, "", at_once=True) == want
    assert sum(report.num_accepted for report in reports) > 100


@pytest.fixture(scope="module")
def cycle() -> Iterator[Llama]:
    """Says 1 2 3 4 1 2 3 4 … and after 10 a different token each time."""
    chain = {1: 2, 2: 3, 3: 4, 4: 1} | {token_id: token_id + 1 for token_id in range(10, 90)}
    options = dataclasses.replace(SMALL, speculation="auto")
    weights = tiny.scripted_weights("divisible", chain)
    with tiny.make_llama("divisible", options=options, weights=weights) as llama:
        yield llama


GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=40)


def test_a_repeated_text_takes_few_steps(cycle: Llama):
    reports: list[StepReport] = []
    cycle.engine.on_steps = reports.append
    done = run(cycle.engine, [1, 2, 3, 4, 1, 2, 3], GREEDY)
    assert done.tokens == [4, 1, 2, 3] * 10
    assert done.request.num_accepted >= 30
    # The last dispatch may have been launched before the end was known.
    assert sum(report.num_steps for report in reports) <= 10
    assert sum(report.num_tokens for report in reports) == 40
    assert sum(report.num_accepted for report in reports) == done.request.num_accepted


def test_what_never_was_before_is_not_drafted(cycle: Llama):
    reports: list[StepReport] = []
    cycle.engine.on_steps = reports.append
    done = run(cycle.engine, [10], GREEDY)
    assert done.tokens == [*range(11, 51)]
    assert sum(report.num_drafted for report in reports) == done.request.num_accepted == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 8, 9])
def test_a_budget_ends_inside_an_accepted_run(cycle: Llama, max_tokens: int):
    done = run(cycle.engine, [1, 2, 3, 4] * 3, dataclasses.replace(GREEDY, max_tokens=max_tokens))
    assert done.tokens == ([1, 2, 3, 4] * 3)[:max_tokens]
    assert done.finish_reason == "length"


def test_a_stop_id_ends_inside_an_accepted_run(cycle: Llama):
    done = run(cycle.engine, [1, 2, 3, 4] * 3, dataclasses.replace(GREEDY, stop_token_ids=(3,)))
    assert done.tokens == [1, 2, 3]
    assert done.finish_reason == "stop"
    # Nor does what was drafted past it count for the row that comes next.
    assert run(cycle.engine, [1, 2, 3, 4] * 3, GREEDY).tokens == [1, 2, 3, 4] * 10


def test_the_whole_context_is_used_and_no_more(cycle: Llama):
    prompt = [1, 2, 3, 4] * 30
    done = run(cycle.engine, prompt, dataclasses.replace(GREEDY, max_tokens=None))
    assert len(prompt) + len(done.tokens) == cycle.max_context
    assert done.tokens == ([1, 2, 3, 4] * 10)[: len(done.tokens)]


def test_a_prediction_is_followed_and_found_again_after_a_change(cycle: Llama):
    """The model counts on from 20; the prediction begins so, differs at one place, and goes on."""
    prediction = [*range(21, 30), 200, *range(31, 50)]
    plain = run(cycle.engine, [20], dataclasses.replace(GREEDY, max_tokens=28))
    done = Collector(cycle.engine, [20], dataclasses.replace(GREEDY, max_tokens=28), prediction=prediction).wait()
    assert done.tokens == plain.tokens == [*range(21, 49)]
    assert plain.request.num_accepted == plain.request.num_predicted == 0
    assert 18 <= done.request.num_predicted == done.request.num_accepted < 28


def test_a_prediction_may_be_given_in_python(cycle: Llama):
    params, prediction = dataclasses.replace(GREEDY, max_tokens=28), [*range(21, 49)]
    done = cycle.generate([20], params, prediction=prediction)
    assert list(done.token_ids) == prediction
    assert done.num_accepted >= 20
    assert [i for delta in cycle.stream([20], params, prediction=prediction) for i in delta.token_ids] == prediction
    with pytest.raises(RequestError, match="tokenizer"):
        cycle.generate([20], params, prediction="a text")


def test_a_prediction_outside_the_vocabulary_is_refused(cycle: Llama):
    with pytest.raises(RequestError, match="the prediction has token ids outside 0 to 279"):
        Collector(cycle.engine, [20], GREEDY, prediction=[3, 280])


def test_only_what_is_built_can_be_asked_for():
    with pytest.raises(ConfigError, match="speculation must be one of off, lookup, draft, auto, got 'medusa'"):
        EngineOptions(speculation="medusa")  # type: ignore[arg-type]
