"""What goes wrong stays where it went wrong: stalls, failures, NaN, exhausted pages, cancels at any moment."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
from collector import TIMEOUT_S, Collector, assert_idle, held, run, wait_until

from jaxllama import Engine, SamplingParams
from jaxllama.decode.steps import decode_steps, prefill
from jaxllama.errors import EngineStoppedError, LockstepError, NonFiniteLogitsError

CONTEXT = tiny.SMALL.max_context or 0
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
NAME = "divisible"


def prompt(length: int, seed: int = 0) -> list[int]:
    return tiny.prompt_of(NAME, length, seed)


# ---- Health ----


def test_stats_tell_the_load(engine: Engine):
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_used, stats.num_pages) == (0, 0, 0, 120)
    assert engine.health() is None
    with held(engine):
        waiting = [Collector(engine, prompt(9), GREEDY) for _ in range(2)]
        assert engine.stats().num_waiting == 2
    for done in waiting:
        done.wait()
    assert_idle(engine)


def test_a_stalled_step_shows_in_health():
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, stall_timeout_s=0.3)) as llama:
        run(llama.engine, prompt(3), GREEDY)
        time.sleep(0.4)
        assert llama.engine.health() is None, "idle is not stalled"
        with held(llama.engine):
            waiting = [Collector(llama.engine, prompt(3), GREEDY) for _ in range(5)]
        waiting[0].wait()
        # Held with rows running: the next callback of a request that is not finished.
        is_held, release = threading.Event(), threading.Event()

        def hold(_: Any) -> None:
            is_held.set()
            release.wait(TIMEOUT_S)

        llama.engine.submit(prompt(3), SamplingParams(ignore_eos=True), hold)
        assert is_held.wait(TIMEOUT_S)
        assert wait_until(lambda: llama.engine.health() is not None)
        assert "no step has finished" in (llama.engine.health() or "")
        assert not llama.engine.stats().ready
        release.set()
        assert wait_until(lambda: llama.engine.health() is None)


def test_a_long_prefill_is_not_a_stall(monkeypatch):
    seen: list[str | None] = []

    def slow(*args: Any, **options: Any) -> Any:
        seen.append(engine.health())
        time.sleep(0.4)
        return prefill(*args, **options)

    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, stall_timeout_s=2.0, chunk_sizes=(8,))) as llama:
        engine = llama.engine
        run(engine, prompt(3), GREEDY)
        monkeypatch.setattr("jaxllama.engine.device.prefill", slow)
        run(engine, prompt(70), GREEDY)
    assert seen == [None] * 9


@pytest.mark.parametrize("broken", ["decode_steps", "prefill"])
def test_a_failed_engine_fails_every_caller_once_and_says_so(monkeypatch, broken):
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is on fire")

    with tiny.make_llama() as llama:
        engine = llama.engine
        run(engine, prompt(3), GREEDY)
        with held(engine):
            callers = [Collector(engine, prompt(12), GREEDY) for _ in range(7)]
            monkeypatch.setattr(f"jaxllama.engine.device.{broken}", fail)
        for done in callers:
            assert done.wait().finish_reason == "error"
            assert isinstance(done.error, EngineStoppedError)
            assert "on fire" in str(done.error)
        assert "RuntimeError" in (engine.health() or "")
        assert not engine.stats().ready
        assert_idle(engine)
        with pytest.raises(EngineStoppedError, match="on fire"):
            engine.submit(prompt(3), GREEDY, pytest.fail)
        assert all(not done.violations for done in callers)


def test_requests_end_when_another_process_is_lost_though_the_device_hangs(monkeypatch):
    hangs, release = threading.Event(), threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        hangs.set()
        release.wait(TIMEOUT_S)
        return decode_steps(*args, **kwargs)

    with tiny.make_llama() as llama:
        engine = llama.engine
        run(engine, prompt(3), GREEDY)
        monkeypatch.setattr("jaxllama.engine.device.decode_steps", hang)
        callers = [Collector(engine, prompt(12), GREEDY) for _ in range(7)]
        assert hangs.wait(TIMEOUT_S)
        # What the group's watchdog does.
        engine._abandon(LockstepError("process 1 is gone"))
        for done in callers:
            assert done.is_ended
            assert done.finish_reason == "error"
            assert "process 1 is gone" in str(done.error)
        assert "process 1 is gone" in (engine.health() or "")
        with pytest.raises(EngineStoppedError, match="process 1 is gone"):
            engine.submit(prompt(3), GREEDY, pytest.fail)
        release.set()
    assert all(not done.violations for done in callers)


def test_a_callback_that_raises_hurts_nobody_else(engine: Engine):
    """A server's callback raises when its event loop is closed."""

    def fail(_: Any) -> None:
        raise RuntimeError("Event loop is closed")

    with held(engine):
        others = [
            Collector(engine, prompt(3, seed), SamplingParams(temperature=0, ignore_eos=True)) for seed in range(3)
        ]
        engine.submit(prompt(3), GREEDY, fail)
        others += [Collector(engine, prompt(3, seed), GREEDY) for seed in range(3)]
    assert [done.wait().finish_reason for done in others] == ["length"] * 6
    assert engine.health() is None
    assert_idle(engine)


# ---- NaN ----


def poisoned_weights(token_id: int) -> tiny.Weights:
    weights = dict(tiny.weights_of(NAME))
    embedding = weights["model.embed_tokens.weight"].copy()
    embedding[token_id] = np.nan
    return weights | {"model.embed_tokens.weight": embedding}


POISON = 77


@pytest.fixture(params=[None, "int8"])
def poisoned(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A prompt with POISON in it makes NaN; integers hold none, so of int8 it is the scales that do."""
    int8 = request.param
    options = dataclasses.replace(tiny.SMALL, kv_dtype=int8)
    with tiny.make_llama(weights=poisoned_weights(POISON), quantize=int8, options=options) as llama:
        yield llama.engine


def clean_prompt(length: int, seed: int) -> list[int]:
    return [token_id if token_id != POISON else 78 for token_id in prompt(length, seed)]


# The model may say POISON itself, and then rightly fails.
CLEAN = dataclasses.replace(GREEDY, logit_bias={POISON: -100.0}, logprobs=2)


def test_nan_fails_only_the_request_that_made_it(poisoned: Engine):
    want = [run(poisoned, clean_prompt(20, seed), CLEAN) for seed in range(3)]
    with held(poisoned):
        before = [Collector(poisoned, clean_prompt(20, seed), CLEAN) for seed in range(2)]
        bad = Collector(poisoned, [*prompt(7), POISON, *prompt(6)], CLEAN)
        after = Collector(poisoned, clean_prompt(20, 2), CLEAN)
    assert bad.wait().finish_reason == "error"
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert bad.tokens == []
    for got, alone in zip([*before, after], want, strict=True):
        assert got.wait().tokens == alone.tokens
    assert poisoned.health() is None
    assert_idle(poisoned)


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9, 16, 17, 31, 33, 37])
def test_nan_in_reused_pages_reaches_nobody(poisoned: Engine, length):
    """Every page has held NaN before; prompts of all alignments, so that chunks end in and at the edge of pages."""
    want = run(poisoned, clean_prompt(length, length), CLEAN)
    num_bad = 6
    for _ in range(num_bad):
        bad = [Collector(poisoned, [POISON] * (CONTEXT - 1), CLEAN) for _ in range(4)]
        assert [done.wait().finish_reason for done in bad] == ["error"] * 4
    # Four at a time hold 96 of 120 pages, from either end of the free list.
    together = [Collector(poisoned, clean_prompt(length, length), CLEAN) for _ in range(4)]
    for done in together:
        assert done.wait().finish_reason == "length", done.error
        assert done.tokens == want.tokens


@pytest.mark.parametrize("length", [20, 21, 22, 23])
def test_nan_in_the_padding_reaches_nobody(length):
    """Chunks are padded with some token: its embedding must not matter."""
    with tiny.make_llama(weights=poisoned_weights(0)) as llama:
        ids = [token_id or 1 for token_id in prompt(length)]
        done = run(llama.engine, ids, dataclasses.replace(GREEDY, logit_bias={0: -100.0}))
    assert done.finish_reason == "length", done.error


# ---- Pages ----


def test_rows_set_aside_for_pages_resume_as_if_nothing_had_happened(engine: Engine):
    """25 pages for rows that need 24 each: they are set aside again and again."""
    variants = [
        {"temperature": 0.0},
        {"seed": 5, "temperature": 1.3},
        {"seed": 6, "top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"seed": 7, "min_tokens": 60, "stop_token_ids": tuple(range(30))},
        {"temperature": 0.0, "logit_bias": {5: 3.0}},
    ]
    params = [SamplingParams(ignore_eos=True, logprobs=3, max_tokens=75, **values) for values in variants]  # type: ignore[arg-type]
    prompts = [prompt(length, seed=length) for length in (5, 14, 1, 9, 20)]
    want = [run(engine, ids, p) for ids, p in zip(prompts, params, strict=True)]
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, num_pages=26)) as llama:
        with held(llama.engine):
            got = [Collector(llama.engine, ids, p) for ids, p in zip(prompts, params, strict=True)]
        for one, other in zip(want, got, strict=True):
            assert other.wait().tokens == one.tokens
            assert other.finish_reason == one.finish_reason
        assert_idle(llama.engine)


def test_exhausted_pages_never_deadlock():
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, num_pages=26)) as llama:
        params = SamplingParams(ignore_eos=True, temperature=0)
        done = [Collector(llama.engine, prompt(1 + 13 * i % 90, i), params) for i in range(20)]
        for i, collector in enumerate(done):
            assert collector.wait().finish_reason == "length"
            assert len(collector.tokens) == CONTEXT - (1 + 13 * i % 90)
        assert_idle(llama.engine)


def test_every_request_ends_once_under_random_cancels():
    rng = random.Random(5)
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, num_pages=26, max_queue=1000)) as llama:
        done: list[Collector] = []
        deadline = time.monotonic() + 6

        def submit(worker: int) -> None:
            local = random.Random(worker)
            while time.monotonic() < deadline and len(done) < 400:
                params = SamplingParams(
                    ignore_eos=local.random() < 0.5,
                    max_tokens=local.choice([0, 1, 5, 40, None]),
                    temperature=local.choice([0, 1.0]),
                    logprobs=local.choice([None, 2]),
                )
                collector = Collector(llama.engine, prompt(local.randrange(1, 60), local.randrange(99)), params)
                done.append(collector)
                time.sleep(local.random() * 0.02)
                if local.random() < 0.5:
                    collector.request.cancel()

        workers = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.01)
            if done and rng.random() < 0.3:
                rng.choice(done).request.cancel()
        for worker in workers:
            worker.join()
        for collector in done:
            collector.wait()
            assert not collector.violations
            assert collector.finish_reason in ("stop", "length", "cancelled")
        assert len(done) > 50
        assert llama.engine.health() is None
        assert_idle(llama.engine)
