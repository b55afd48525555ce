"""What the engine launches, in which order: nobody waits for more than a chunk, and a row that ends is free at once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from collector import TIMEOUT_S, Collector, held, run

from jaxllama import EngineOptions, Llama, SamplingParams, TokenOutput
from jaxllama.engine.calls import Decode, Insert, Prefill
from jaxllama.engine.device import Device
from jaxllama.model.platforms.cpu import PLAIN

NAME = "divisible"
type Calls = list[tuple[str, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Calls of the device's programs: ("prefill", tokens that it takes the time of), ("decode", rows that may run),
    ("insert", row)."""
    log: Calls = []
    run = Device.run

    def spied(self: Device, call: Any) -> Any:
        match call:
            case Prefill(_, chunk):
                skips = self._platform.has_layer_kernel
                log.append(("prefill", int(chunk.num_tokens) if skips else len(chunk.tokens)))
            case Decode(_, keep, _):
                log.append(("decode", int(keep.sum())))
            case Insert(row, _):
                log.append(("insert", int(row)))
        return run(self, call)

    monkeypatch.setattr(Device, "run", spied)
    return log


def prefilled_between_dispatches(calls: Calls) -> list[int]:
    """Tokens' worth of prefill programs after each dispatch but the last."""
    sums = [0]
    for name, value in calls:
        if name == "decode":
            sums.append(0)
        elif name == "prefill":
            sums[-1] += value
    return sums[1:-1]


# ---- Chunked prefill ----


@pytest.fixture(scope="module")
def far() -> Iterator[Llama]:
    """One cheap layer of 20,000 positions, with the chunks of a CPU."""
    options = EngineOptions(max_rows=2, max_context=8192, dispatch_s=1e-6)
    with tiny.make_llama("far", options=options) as llama:
        assert llama.engine.chunk_sizes == PLAIN.chunk_sizes
        yield llama


def test_a_prompt_of_6000_tokens_lets_streams_pass_after_every_chunk(far: Llama, calls: Calls):
    """A running stream waits for one largest chunk at most, and advances after each."""
    long_prompt = tiny.prompt_of("far", 6000)
    stream = Collector(far.engine, [1, 2, 3], SamplingParams(temperature=0, ignore_eos=True, max_tokens=400))
    stream.wait_for_first()
    calls.clear()
    long_one = run(far.engine, long_prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    until_then = calls[: max(i for i, (name, _) in enumerate(calls) if name == "insert")]
    stream.request.cancel()
    assert len(long_one.tokens) == 1
    waits = prefilled_between_dispatches(until_then)
    assert sum(waits) >= 6000 - 2 * 512
    assert max(waits) <= 512
    assert len([wait for wait in waits if wait]) >= 10
    assert all(rows >= 1 for name, rows in until_then if name == "decode"), "the stream runs on"


def test_many_short_prompts_together_are_one_chunk_s_work_a_turn(far: Llama, calls: Calls):
    with held(far.engine):
        calls.clear()
        done = [
            Collector(far.engine, tiny.prompt_of("far", 300, seed=i), SamplingParams(max_tokens=40, ignore_eos=True))
            for i in range(6)
        ]
    for collector in done:
        collector.wait()
    assert max(prefilled_between_dispatches(calls)) <= 512


# ---- The end of a row ----

CHAIN = {40: 41, 41: 42, 42: 43, 43: 44, 44: 40}
ENDS: dict[str, dict[str, Any]] = {
    "stop id": {"stop_token_ids": (43,)},
    "stop id after min_tokens": {"stop_token_ids": (43,), "min_tokens": 5},
    "end of sequence": {"logit_bias": {tiny.EOS_ID: 100.0}, "min_tokens": 6},
    "budget": {"max_tokens": 9},
    "budget that ignores the end of sequence": {"max_tokens": 9, "ignore_eos": True, "logit_bias": {tiny.EOS_ID: 9.0}},
    "cancelled, as for a stop string": {},
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("dispatch_s", [1e-6, 0.05])
def test_a_row_is_free_within_one_dispatch_of_its_end(end, dispatch_s, calls: Calls):
    """One row: who waits for it is in it after at most the dispatch that was on its way already."""
    options = dataclasses.replace(tiny.SMALL, max_rows=1, dispatch_s=dispatch_s)
    params = dataclasses.replace(SamplingParams(temperature=0), **ENDS[end])
    ended, box = threading.Event(), []

    def on_output(output: TokenOutput) -> None:
        if output.finish_reason is None and end.startswith("cancelled") and not box[0].is_cancelled:
            box[0].cancel()
            calls.append(("end", 0))
        elif output.finish_reason is not None:
            if not end.startswith("cancelled"):
                calls.append(("end", 0))
            ended.set()

    with tiny.make_llama(weights=tiny.scripted_weights(NAME, CHAIN), options=options) as llama:
        with held(llama.engine):
            calls.clear()
            box.append(llama.engine.submit([3, 40], params, on_output))
            following = Collector(llama.engine, [5, 6], SamplingParams(temperature=0, max_tokens=1))
        assert ended.wait(TIMEOUT_S)
        following.wait()
    names = [name for name, _ in calls]
    at = names.index("end")
    assert names[:at].count("insert") == 1
    assert names[at : names.index("insert", at)].count("decode") <= 1, names
