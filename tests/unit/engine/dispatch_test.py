"""How many steps a dispatch has, and when the next one is launched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from collector import Collector, held, run

from jaxllama import Engine, SamplingParams
from jaxllama.engine.calls import Decode

FREE = SamplingParams(temperature=0, ignore_eos=True, max_tokens=60)


def prompt(seed: int) -> list[int]:
    return tiny.prompt_of("divisible", 5, seed)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Time for a dispatch is no limit."""
    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, dispatch_s=1e6)) as llama:
        yield llama.engine


def watch(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[tuple[str, int]]:
    """("launch", its steps) and ("read", its steps that ran) of every dispatch, in their order."""
    events: list[tuple[str, int]] = []
    run, read = engine._programs.run, engine._read

    def launching(call: Any) -> Any:
        if isinstance(call, Decode):
            events.append(("launch", int(call.max_steps)))
        return run(call)

    def reading(dispatch: Any) -> None:
        events.append(("read", int(dispatch.output.num_steps)))
        read(dispatch)

    monkeypatch.setattr(engine._programs, "run", launching)
    monkeypatch.setattr(engine, "_read", reading)
    return events


def test_a_dispatch_has_up_to_32_steps_and_the_next_is_launched_before_it_is_read(engine, monkeypatch):
    events = watch(monkeypatch, engine)
    assert len(run(engine, prompt(0), FREE).tokens) == 60
    assert events == [("launch", 32), ("launch", 32), ("read", 32), ("read", 28)]


def test_a_short_time_for_a_dispatch_is_one_step(engine, monkeypatch):
    monkeypatch.setattr(engine, "options", dataclasses.replace(engine.options, dispatch_s=1e-9))
    events = watch(monkeypatch, engine)
    run(engine, prompt(0), FREE)
    assert {steps for kind, steps in events if kind == "launch"} == {1}
    assert [kind for kind, _ in events[:4]] == ["launch", "launch", "read", "launch"]


def test_while_requests_wait_a_dispatch_ends_with_the_first_budget_and_the_next_is_short(engine, monkeypatch):
    """So that the row is soon the next request's: the one launched before the end is known has one step."""
    events = watch(monkeypatch, engine)
    params = [dataclasses.replace(FREE, max_tokens=10 + seed) for seed in range(tiny.SMALL.max_rows + 1)]
    with held(engine):
        done = [Collector(engine, prompt(seed), one) for seed, one in enumerate(params)]
        events.clear()
    assert [len(collector.wait().tokens) for collector in done] == [one.max_tokens for one in params]
    sizes = [steps for kind, steps in events if kind == "launch"]
    assert sizes[:2] == [10, 1]
    assert sizes[-1] == 32
