"""A draft model changes the time that an answer takes and no bit of it, and its cache is that of the row's tokens.

A draft model that is the model itself drafts nothing wrong, so that whatever its cache lacks or has wrong shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import tiny
from collector import Collector, assert_idle, held
from oracle.tiny_models import random_weights

import jaxllama
from jaxllama import EngineOptions, Llama, SamplingParams, make_mesh
from jaxllama.engine.calls import PrefillDraft, SavePages
from jaxllama.engine.device import Device
from jaxllama.engine.options import StepReport
from jaxllama.engine.scheduling.speculation import StepTimes
from jaxllama.errors import ConfigError
from jaxllama.model import native
from jaxllama.text.encoding.tokenizer import load_tokenizer
from jaxllama.weights.opening import open_draft

pytestmark = pytest.mark.optimized

NAME = "divisible"
PLAIN = dataclasses.replace(tiny.SMALL, max_context=136, num_pages=60, dispatch_s=1e-6)
"""One pool for all, as programs are compiled for each: of four long rows some are set aside."""
DRAFTED = dataclasses.replace(PLAIN, speculation="draft")
FREE = StepTimes({1: 1.0, 4: 1.0}, {1: 0.1, 32: 0.05}, {1: 0.0})
"""Drafts always pay."""
DEAR = StepTimes({1: 1.0, 4: 1.0}, {1: 0.1, 32: 0.05}, {1: 1e6})
"""The draft model never does."""
PATIENCE_S = 300.0
"""On a machine that does much else the first request waits long for its programs."""
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "presence_penalty": 0.9, "frequency_penalty": 0.3},
    {"temperature": 1.3, "top_p": 0.9, "logprobs": 3},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_tokens": 9, "ignore_eos": False},
    {"temperature": 0.8, "top_k": 12, "min_p": 0.01, "logit_bias": {5: 4.0, 9: 3.0}},
]
type Request = tuple[list[int], SamplingParams]
type Outcome = tuple[list[int], Any, str | None]


def requests_of(num: int = 12) -> list[Request]:
    """All kinds of sampling, prompts of one token and of many."""
    lengths = (1, 2, 5, 30, 61, 90)
    base: dict[str, Any] = {"ignore_eos": True}
    return [
        (
            tiny.prompt_of(NAME, lengths[i % len(lengths)], seed=i),
            SamplingParams(seed=i, max_tokens=(40, 1, 23, 40, 7)[i % 5], **base | KINDS[(i // 2) % len(KINDS)]),
        )
        for i in range(num)
    ]


def make_model(
    options: EngineOptions = DRAFTED,
    times: StepTimes = FREE,
    dtype: str = "bfloat16",
    draft: str | None = NAME,
    **rest: Any,
) -> Llama:
    llama = tiny.make_llama(NAME, dtype=jnp.dtype(dtype), options=options, draft=draft, **rest)
    set_times(llama, times)
    return llama


def set_times(llama: Llama, times: StepTimes) -> None:
    """What the engine takes its steps for from now on."""
    llama.engine._speculation.times = dict.fromkeys(llama.engine._row_buckets, times)


def outcomes(llama: Llama, requests: list[Request], scope: str = "", *, at_once: bool = True) -> list[Outcome]:
    if at_once:
        with held(llama.engine):
            got = [Collector(llama.engine, *request, cache_scope=scope) for request in requests]
    else:
        got = [Collector(llama.engine, *request, cache_scope=scope).wait(PATIENCE_S) for request in requests]
    return [(done.wait(PATIENCE_S).tokens, done.logprobs, done.finish_reason) for done in got]


def counted(llama: Llama) -> list[StepReport]:
    """Gets a report for each dispatch from now on."""
    reports: list[StepReport] = []
    llama.engine.on_steps = reports.append
    return reports


def num_drafted(reports: list[StepReport]) -> tuple[int, int]:
    """So many drafts were verified, and so many accepted."""
    return sum(report.num_drafted for report in reports), sum(report.num_accepted for report in reports)


@pytest.fixture(scope="module")
def want() -> list[Outcome]:
    """What plain decoding says."""
    with make_model(PLAIN, draft=None) as plain:
        return outcomes(plain, requests_of())


@pytest.fixture(scope="module")
def itself() -> Iterator[Llama]:
    """A model that drafts for itself."""
    with make_model() as llama:
        yield llama


def test_a_model_that_drafts_for_itself_is_always_right(itself: Llama, want: list[Outcome]):
    """Alone and together, at any temperature and with any penalty."""
    set_times(itself, FREE)
    for at_once, scope in ((False, "alone"), (True, "together")):
        reports = counted(itself)
        assert outcomes(itself, requests_of(), scope, at_once=at_once) == want
        drafted, accepted = num_drafted(reports)
        # Where a row may stop by itself, what was drafted past its end is lost.
        assert accepted > 100
        assert drafted - accepted <= 2 * itself.engine.options.draft_tokens
        assert accepted > 0.7 * sum(report.num_tokens for report in reports)
    assert_idle(itself.engine)


def test_a_model_that_is_often_wrong_changes_no_bit(want: list[Outcome], monkeypatch: pytest.MonkeyPatch):
    """Also where rows are set aside."""
    saved = calls_of(monkeypatch, SavePages)
    with make_model(draft_weights=random_weights(tiny.MODELS[NAME], 99)) as llama:
        reports = counted(llama)
        assert outcomes(llama, requests_of()) == want
        drafted, accepted = num_drafted(reports)
        assert drafted > accepted + 100
        assert saved
        assert_idle(llama.engine)


def calls_of(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[Any]:
    """Gets the calls of that kind from now on."""
    found: list[Any] = []
    make_call = Device.run

    def spy(self: Device, call: Any) -> Any:
        if isinstance(call, kind):
            found.append(call)
        return make_call(self, call)

    monkeypatch.setattr(Device, "run", spy)
    return found


SURE = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)


def run_sure(llama: Llama, prompt: list[int], scope: str, params: SamplingParams = SURE) -> Collector:
    """Runs a request of which every draft must be accepted."""
    reports = counted(llama)
    done = Collector(llama.engine, prompt, params, cache_scope=scope).wait(PATIENCE_S)
    drafted, accepted = num_drafted(reports)
    assert drafted == accepted > 25
    return done


def test_what_is_found_in_the_cache_is_found_for_both(itself: Llama, monkeypatch: pytest.MonkeyPatch):
    set_times(itself, FREE)
    prompt = tiny.prompt_of(NAME, 50)
    first = run_sure(itself, prompt, "cache")
    prefills = calls_of(monkeypatch, PrefillDraft)
    again = run_sure(itself, prompt, "cache")
    assert again.tokens == first.tokens
    assert again.request.num_cached_tokens == 48
    assert sum(int(call.chunk.num_tokens) for call in prefills) == 1
    # The output was kept too.
    turn = run_sure(itself, [*prompt, *first.tokens], "cache")
    assert turn.request.num_cached_tokens >= 84
    assert sum(int(call.chunk.num_tokens) for call in prefills) <= 1 + 90 - 84


def test_what_others_left_without_drafts_is_filled(itself: Llama):
    """By scores, and by rows for which the draft model did not pay."""
    set_times(itself, FREE)
    prompt = tiny.prompt_of(NAME, 61, seed=1)
    for entry in itself.prompt_logprobs(prompt, cache_scope="left"):
        assert entry.rank >= 1
    assert run_sure(itself, prompt, "left").request.num_cached_tokens == 60
    set_times(itself, DEAR)
    reports = counted(itself)
    plain = Collector(itself.engine, prompt, dataclasses.replace(SURE, seed=4), cache_scope="left").wait(PATIENCE_S)
    assert num_drafted(reports) == (0, 0)
    set_times(itself, FREE)
    turn = run_sure(itself, [*prompt, *plain.tokens], "left", dataclasses.replace(SURE, max_tokens=35))
    assert turn.request.num_cached_tokens == 100


def test_a_row_that_has_gone_on_without_drafts_catches_up(itself: Llama):
    """Plain steps until 20 tokens are there; from then on all drafts are right."""
    set_times(itself, DEAR)
    reports: list[StepReport] = []
    itself.engine.on_steps = lambda report: (
        reports.append(report),
        sum(r.num_tokens for r in reports) >= 20 and set_times(itself, FREE),
    )[0]
    params = dataclasses.replace(SURE, max_tokens=80)
    done = Collector(itself.engine, tiny.prompt_of(NAME, 40, seed=2), params, cache_scope="late").wait(PATIENCE_S)
    assert len(done.tokens) == 80
    drafted, accepted = num_drafted(reports)
    assert drafted == accepted > 30
    assert num_drafted(reports[:20]) == (0, 0)


def test_a_row_that_was_set_aside_is_drafted_for_again(monkeypatch: pytest.MonkeyPatch):
    saved = calls_of(monkeypatch, SavePages)
    with make_model() as llama:
        reports = counted(llama)
        params = dataclasses.replace(SURE, max_tokens=90)
        outcomes(llama, [(tiny.prompt_of(NAME, 8, seed=i), dataclasses.replace(params, seed=i)) for i in range(5)])
        drafted, accepted = num_drafted(reports)
        assert saved
        assert drafted == accepted > 250


@pytest.mark.slow
def test_what_is_not_found_is_drafted_by_the_model():
    """With "auto": 1 2 3 4 1 2 3 4 … repeats itself, and after 10 comes a different token each time."""
    chain = {1: 2, 2: 3, 3: 4, 4: 1} | {token_id: token_id + 1 for token_id in range(10, 90)}
    weights = tiny.scripted_weights(NAME, chain)
    greedy = SamplingParams(temperature=0, ignore_eos=True, max_tokens=40)
    options = dataclasses.replace(PLAIN, speculation="auto", draft_tokens=3)
    with make_model(options, weights=weights, draft_weights=weights) as llama:
        found, made = (Collector(llama.engine, ids, greedy).wait(PATIENCE_S) for ids in ([1, 2, 3, 4, 1, 2, 3], [10]))
        assert found.tokens == [4, 1, 2, 3] * 10
        assert made.tokens == [*range(11, 51)]
        assert found.request.num_accepted >= 33
        assert 27 <= made.request.num_accepted <= 30


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 8}])
def test_a_mesh_has_both_models(mesh: dict[str, int]):
    """tp = 8 splits rows and pages too."""
    requests = requests_of(6)
    with make_model(PLAIN, draft=None, **mesh) as plain:
        expected = outcomes(plain, requests)
    with make_model(**mesh) as llama:
        reports = counted(llama)
        assert outcomes(llama, requests) == expected
        drafted, accepted = num_drafted(reports)
        assert accepted > 0.7 * drafted > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "changes"), [("float32", {}), ("bfloat16", {"kv_dtype": "int8"}), ("float32", {"quantize": "int8"})]
)
def test_any_dtype_keeps_its_bits(dtype: str, changes: dict[str, Any]):
    quantize = changes.get("quantize")
    options = {"kv_dtype": changes.get("kv_dtype")}
    with make_model(dataclasses.replace(PLAIN, **options), dtype=dtype, draft=None, quantize=quantize) as plain:
        expected = outcomes(plain, requests_of(18))
    for draft in (NAME, "far"):
        with make_model(dataclasses.replace(DRAFTED, **options), dtype=dtype, draft=draft, quantize=quantize) as llama:
            assert outcomes(llama, requests_of(18), "alone", at_once=False) == expected
            assert outcomes(llama, requests_of(18)) == expected


@pytest.mark.slow
def test_where_programs_differ_in_bits_an_answer_depends_on_its_request_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    with make_model(dtype="float32", draft="far") as llama:
        assert not llama.engine.platform.programs_agree
        alone = outcomes(llama, requests_of(), "alone", at_once=False)
        reports = counted(llama)
        assert outcomes(llama, requests_of()) == alone
        assert num_drafted(reports)[0] > 100
        set_times(llama, DEAR)
        assert outcomes(llama, requests_of(), "dear") == alone


@pytest.mark.slow
def test_warm_up_measures_what_the_draft_model_takes(itself: Llama):
    itself.engine.warm_up()
    num_compiled = itself.engine.stats().num_compilations
    for num_rows in itself.engine._row_buckets:
        times = itself.engine._speculation.times[num_rows]
        assert times.by_model
        assert times.model_cost(1) > 0
    outcomes(itself, requests_of(4), "warm")
    assert itself.engine.stats().num_compilations == num_compiled


def test_a_draft_model_needs_a_mode_that_uses_it():
    with pytest.raises(ConfigError, match="a draft model needs speculation 'draft' or 'auto', got 'off'"):
        EngineOptions(draft="here")
    with pytest.raises(ConfigError, match="draft_tokens must be from 1 to 16, got 17"):
        EngineOptions(speculation="draft", draft="here", draft_tokens=17)
    with pytest.raises(ConfigError, match="speculation 'draft' needs a draft model"):
        tiny.make_llama(NAME, options=DRAFTED)


def test_kv_heads_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="over 2 devices, and the draft model has 1"):
        tiny.make_llama(NAME, tp=2, options=DRAFTED, draft="far")


def test_it_is_loaded_from_where_it_is(tmp_path: Path):
    """As the model's dtype, and onto its mesh."""
    folder = tiny.write_checkpoint(tmp_path / "model", NAME)
    options = dataclasses.replace(DRAFTED, draft=folder)
    with jaxllama.load(folder, make_mesh(tiny.config_of(NAME), tp=2), dtype="bfloat16", options=options) as llama:
        draft = llama.engine.draft
        assert draft is not None
        assert draft.config == llama.config
        assert draft.params["norm"].dtype == jnp.bfloat16
        assert draft.params["norm"].sharding.mesh == llama.mesh
        both = llama.engine.kv_bytes
    with tiny.make_llama(NAME, tp=2, dtype=jnp.bfloat16, options=PLAIN) as plain:
        assert both == 2 * plain.engine.kv_bytes


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path, tokenizer_folder: Path):
    tokenizer, config = load_tokenizer(tokenizer_folder, 280), tiny.config_of(NAME)
    folder = tiny.write_checkpoint(tmp_path / "draft", NAME)
    assert open_draft(folder, config, tokenizer, "a/model").config.vocab_size == 280
    changed = (folder / "tokenizer.json").read_text().replace("<think>", "<thunk>")
    other = tmp_path / "other"
    tiny.write_checkpoint(other, NAME)
    (other / "tokenizer.json").write_text(changed)
    with pytest.raises(ConfigError, match=r"'other' has not the vocabulary of 'a/model': token 259 is b'<thunk>'"):
        open_draft(other, config, tokenizer, "a/model")
    with pytest.raises(ConfigError, match=r"'draft' has not the vocabulary of 'a/model': 280 tokens, expected 300"):
        open_draft(folder, tiny.config_of(NAME, vocab_size=300), None, "a/model")
