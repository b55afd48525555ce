"""Which chunks share a call: each group's in its order, of one size, and none is forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from jaxllama.decode.params import SamplingParams
from jaxllama.decode.state import MAX_STEPS
from jaxllama.engine.calls import Prefill
from jaxllama.engine.placement import Placement
from jaxllama.engine.scheduling.chunks import ChunkPlan
from jaxllama.engine.scheduling.request import EngineRequest
from jaxllama.engine.scheduling.scheduler import Scheduler
from jaxllama.engine.scheduling.sharing import ChunkPlaces, SharedCalls

SIZES = (1, 2, 3)


@given(
    in_group=st.tuples(*[st.integers(1, 4)] * 3),
    chunks=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(SIZES), st.booleans()), max_size=40),
)
def test_chunks_of_a_group_keep_their_order_and_calls_have_no_more_than_their_places(in_group, chunks):
    """Chunks are their numbers; after some of them those calls are made that have no place left."""
    places = ChunkPlaces(dict(zip(SIZES, in_group, strict=True)), 3)
    waiting: SharedCalls[int] = SharedCalls(places)
    calls, full = [], []
    for number, (group, size, asks) in enumerate(chunks):
        waiting.put(group, size, number)
        if asks:
            full += waiting.take(waits=True)
    assert all(len(group) == places.in_group[call.size] for call in full for group in call.groups)
    calls = [*full, *waiting.take(waits=False)]
    assert not [*waiting.take(waits=False)]
    for call in calls:
        assert any(call.groups)
        assert all(len(group) <= places.in_group[call.size] for group in call.groups)
        assert {chunks[number][1] for group in call.groups for number in group} == {call.size}
    for group in range(3):
        launched = [number for call in calls for number in call.groups[group]]
        assert launched == [number for number, (own, *_) in enumerate(chunks) if own == group]


class Recorder:
    """Notes of each call of prefill the chunks' size, and how many tokens each has."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []

    def run(self, call: Any) -> None:
        if isinstance(call, Prefill):
            tokens = np.atleast_1d(call.chunk.num_tokens).tolist()
            self.calls.append((call.chunk.tokens.shape[-1], tokens))


def make_request(length: int, arrival: int, plan: ChunkPlan) -> EngineRequest:
    """Of so many tokens to prefill, which no other has."""
    prompt = [arrival] * (1 + length)
    keys = plan.page_keys(b"", prompt[:-1])
    nothing: Any = {"on_output": pytest.fail, "stop_ids": frozenset(), "wake": lambda: None, "priority": 0}
    return EngineRequest(prompt, SamplingParams(), budget=10, arrival=arrival, page_keys=keys, **nothing)


def filled(
    lengths: list[int], *, places: ChunkPlaces, shards: int = 1, turns: int = 1
) -> tuple[list[tuple[int, list[int]]], list[bool]]:
    """The calls of so many turns for prompts of these lengths that came together, and which of them run then."""
    plan = ChunkPlan((4, 12), page_size=4, programs_agree=False)
    scheduler = Scheduler(num_rows=8 * shards, num_pages=80, plan=plan, max_steps=MAX_STEPS, num_shards=shards)
    device = Recorder()
    programs: Any = device
    config = tiny.config_of("divisible")
    placement = Placement(config, programs, scheduler, table_width=80, needs_clean_pages=False, places=places)
    requests = [make_request(length, arrival, plan) for arrival, length in enumerate(lengths)]
    for request in requests:
        scheduler.enqueue(request)
    for _ in range(turns):
        placement.fill_rows()
    return device.calls, [request.is_running for request in requests]


def test_short_prompts_share_a_call():
    calls, runs = filled([3, 4, 2], places=ChunkPlaces({4: 3, 12: 1}))
    assert calls == [(4, [3, 4, 2])]
    assert all(runs)


def test_a_lone_prompt_s_chunks_share_one_too():
    """It runs the same program in any company, and its later chunks see what its earlier ones write."""
    calls, runs = filled([11], places=ChunkPlaces({4: 3, 12: 1}))
    assert calls == [(4, [4, 4, 3])]
    assert all(runs)


def test_one_that_is_alone_leaves_places_free():
    assert filled([3], places=ChunkPlaces({4: 2, 12: 1}, 2), shards=2)[0] == [(4, [3, 0, 0, 0])]


def test_groups_prefill_side_by_side():
    """Each has a turn's tokens, 12."""
    calls, runs = filled([4] * 8, places=ChunkPlaces({4: 1, 12: 1}, 2), shards=2)
    assert calls == [(4, [4, 4])] * 3
    assert sum(runs) == 6


@pytest.mark.parametrize(("shards", "first"), [(1, False), (2, True)])
def test_a_long_prompt_holds_up_short_ones_of_its_own_group_alone(shards, first):
    """They come first there by nobody's choice: it was first. Others have their own turn's tokens."""
    calls, runs = filled([60, 3, 3, 3], places=ChunkPlaces({4: 1, 12: 1}, shards), shards=shards)
    assert not runs[0]
    assert any(runs[1:]) == first
    assert max(sum(size for size, tokens in calls if tokens[group]) for group in range(shards)) <= 12
    assert all(filled([60, 3, 3, 3], places=ChunkPlaces({4: 1, 12: 1}, shards), shards=shards, turns=9)[1])
