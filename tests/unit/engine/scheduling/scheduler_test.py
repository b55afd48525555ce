"""The scheduler's laws in any order of events: rows find in their pages what they would have alone, none leak, the line
is kept, the first always advances."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxllama.decode.params import SamplingParams
from jaxllama.decode.scoring import Scores
from jaxllama.decode.state import MAX_STEPS
from jaxllama.engine.calls import ClearPages, CopyPage, ForgetPages, Insert, Prefill, RestorePages, SavePages, Score
from jaxllama.engine.placement import Placement
from jaxllama.engine.scheduling.chunks import ChunkPlan
from jaxllama.engine.scheduling.pages import PagePool
from jaxllama.engine.scheduling.request import EngineRequest, Scoring
from jaxllama.engine.scheduling.scheduler import Scheduler
from jaxllama.engine.scheduling.sharing import ChunkPlaces


def make_request(
    length: int = 0,
    *,
    prompt: list[int] | None = None,
    budget: int = 10,
    priority: int = 0,
    arrival: int = 0,
    scope: bytes = b"",
    plan: ChunkPlan | None = None,
    first: int | None = None,
) -> EngineRequest:
    """A request whose prompt nobody else has, unless `prompt` is given. It scores it from token `first` on."""
    prompt = [arrival] * length if prompt is None else prompt
    return EngineRequest(
        prompt=prompt,
        params=SamplingParams(),
        on_output=pytest.fail,
        budget=budget,
        stop_ids=frozenset(),
        priority=priority,
        arrival=arrival,
        wake=lambda: None,
        scope=scope,
        page_keys=(plan or make_plan()).page_keys(scope, prompt[:-1]),
        scoring=None if first is None else Scoring(first, 0),
    )


def make_plan(*, chunks: tuple[int, ...] = (8, 32), agree: bool = True, anywhere: bool = False) -> ChunkPlan:
    return ChunkPlan(chunks, page_size=4, programs_agree=agree, skips_padding=anywhere)


def make_scheduler(
    *, rows: int = 3, pages: int = 20, plan: ChunkPlan | None = None, shards: int = 1, **windows: Any
) -> Scheduler:
    plan = plan or make_plan()
    return Scheduler(num_rows=rows, num_pages=pages, plan=plan, max_steps=MAX_STEPS, num_shards=shards, **windows)


def spans_of(scheduler: Scheduler, request: EngineRequest) -> list[tuple[int, int, int]]:
    return [tuple(span) for span in scheduler.spans(request)]


def prefill(scheduler: Scheduler, *requests: EngineRequest) -> None:
    """Prefills and activates admitted requests."""
    for request in requests:
        for span in scheduler.spans(request):
            scheduler.advance(request, span)
        request.is_running = True


# ---- Pages ----


def test_page_zero_is_never_given_away():
    pages = PagePool(7)
    assert sorted(pages.take(6) or []) == [1, 2, 3, 4, 5, 6]


def test_taking_too_many_takes_none():
    pages = PagePool(7)
    assert pages.take(7) is None
    assert (pages.num_free, pages.num_used) == (6, 0)
    taken = pages.take(4)
    assert pages.take(3) is None
    assert (pages.num_free, pages.num_used) == (2, 4)
    pages.give_back(taken or [])
    assert (pages.num_free, pages.num_used) == (6, 0)
    assert pages.take(0) == []


@given(st.lists(st.integers(-6, 8), max_size=60))
def test_pages_are_given_once_and_come_back(steps):
    """Positive steps take, negative ones give back the oldest holdings."""
    pages = PagePool(20)
    held: list[list[int]] = []
    for step in steps:
        if step >= 0:
            taken = pages.take(step)
            assert (taken is None) == (step > 19 - sum(map(len, held)))
            held += [] if taken is None else [taken]
        elif held:
            pages.give_back(held.pop(0))
        owned = [page for some in held for page in some]
        assert len(set(owned)) == len(owned) == pages.num_used
        assert set(owned) <= set(range(1, 20))
        assert pages.num_free + pages.num_used == 19


KEYS = [bytes([i]) for i in range(9)]


def test_pages_are_found_up_to_the_first_unknown_key():
    pages = PagePool(9)
    held = pages.take(4) or []
    pages.publish(held, [KEYS[0], KEYS[1], KEYS[3], KEYS[4]])
    assert pages.find(KEYS[:6]) == held[:2]
    assert pages.find(KEYS[3:]) == held[2:]
    assert pages.find([KEYS[8]]) == []


def test_a_shared_page_is_free_when_its_last_holder_is_gone():
    pages = PagePool(5)
    held = pages.take(2) or []
    pages.publish(held, KEYS[:2])
    pages.share(pages.find(KEYS))
    assert pages.num_used == 2
    pages.prove(held)
    assert pages.give_back(held) == []
    assert pages.take(3) is None, "two are held still"
    assert pages.give_back(held) == []
    assert (pages.num_free, pages.num_used, pages.num_cached) == (4, 0, 2)


def test_the_least_recently_used_pages_go_first_and_only_when_needed():
    pages = PagePool(6)
    first, second = pages.take(2) or [], pages.take(2) or []
    pages.publish([*first, *second], KEYS[:4])
    pages.prove([*first, *second])
    for held in (first, second):
        pages.give_back(held)
    assert pages.num_cached == 4
    assert len(pages.take(1) or []) == 1
    assert pages.num_cached == 4, "the page that was free came first"
    pages.share(pages.find(KEYS[:2]))
    pages.give_back(first)
    assert set(pages.take(2) or []) == set(second), "those used last are kept"
    assert pages.find(KEYS[:2]) == first
    # Of a chain the end goes first: what remains can be found.
    assert pages.take(1) == first[1:]
    assert pages.find(KEYS[:2]) == first[:1]


def test_a_held_page_is_never_evicted():
    pages = PagePool(4)
    held = pages.take(2) or []
    pages.publish(held, KEYS[:2])
    pages.prove(held)
    assert not set(pages.take(1) or []) & set(held)
    assert pages.take(1) is None
    assert pages.find(KEYS[:2]) == held


def test_what_may_hold_nan_is_told_and_not_found_again():
    pages = PagePool(6)
    held = pages.take(3) or []
    pages.publish(held, KEYS[:3])
    pages.prove(held[:1])
    assert sorted(pages.give_back(held)) == sorted(held[1:])
    assert pages.find(KEYS[:3]) == held[:1]


def test_a_failed_row_s_pages_are_not_found_while_another_holds_them():
    pages = PagePool(6)
    held = pages.take(3) or []
    pages.publish(held, KEYS[:3])
    pages.prove(held[:1])
    pages.share(held)
    pages.distrust(held)
    assert pages.give_back(held) == []
    assert pages.find(KEYS[:3]) == held[:1], "the first is known to be finite"
    assert sorted(pages.give_back(held)) == sorted(held[1:])


def test_a_page_s_beginning_is_found_until_somebody_takes_the_page():
    pages = PagePool(4)
    first, second, third = taken = pages.take(3) or []
    pages.name_part(first, b"a")
    pages.name_part(second, b"a")  # the first keeps it
    pages.name_part(second, b"b")
    pages.name_part(third, b"c")
    pages.give_back(taken)
    assert [pages.find_part(key) for key in (b"a", b"b", b"c", b"d")] == [first, second, third, None]
    pages.distrust([third])
    assert pages.find_part(b"c") is None
    pages.take(1)  # a row's last pages go first, so its first one is taken next
    assert [pages.find_part(key) for key in (b"a", b"b")] == [None, second]
    pages.forget()
    assert pages.find_part(b"b") is None


def test_of_two_pages_with_one_key_the_first_is_found():
    pages = PagePool(6)
    first, second = pages.take(1) or [], pages.take(1) or []
    pages.publish(first, KEYS[:1])
    pages.publish(second, KEYS[:1])
    assert pages.find(KEYS[:1]) == first
    pages.prove([*first, *second])
    assert pages.give_back(second) == []
    assert pages.find(KEYS[:1]) == first


# ---- Chunks ----


CHUNKS = st.sampled_from([(8, 32), (4,), (16, 48, 128), (64,)])


@given(length=st.integers(1, 300), chunks=CHUNKS, agree=st.booleans())
def test_chunks_cover_all_but_the_last_token_once(length, chunks, agree):
    plan = make_plan(chunks=chunks, agree=agree)
    made = spans_of(make_scheduler(plan=plan), make_request(length, plan=plan))
    assert [position for start, num, _ in made for position in range(start, start + num)] == list(range(length - 1))
    for start, num_tokens, size in made:
        assert size in chunks
        assert start % 4 == 0
        assert 0 < num_tokens <= size
        if size > chunks[0]:
            assert num_tokens >= 0.75 * size, "a smaller one would do"
    partial = [num for _, num, size in made[:-1] if num < size]
    assert not partial, "only the last chunk has padding"


@given(length=st.integers(1, 300), chunks=CHUNKS, has_streams=st.booleans())
def test_one_program_runs_chunks_of_any_length_where_padding_costs_nothing(length, chunks, has_streams):
    plan = ChunkPlan(chunks, page_size=4, programs_agree=True, skips_padding=True)
    assert plan.program_sizes == chunks[-1:]
    longest = plan.longest(has_streams=has_streams)
    made = [*plan.spans(0, length, longest)]
    assert [position for start, num, _ in made for position in range(start, start + num)] == list(range(length))
    assert {size for *_, size in made} == {chunks[-1]}
    assert [num for _, num, _ in made[:-1]] == [longest] * (len(made) - 1), "only the last is shorter"
    assert [plan.cost(span) for span in made] == [num for _, num, _ in made]
    assert plan.page_keys(b"", [*range(length)]) == make_plan(chunks=chunks).page_keys(b"", [*range(length)])


@given(end=st.integers(1, 300), more=st.integers(1, 300), chunks=CHUNKS)
def test_prompts_that_begin_alike_share_at_least_half(end, more, chunks):
    """Where programs differ: the chunks of a shorter prompt are those of a longer one, up to a bounded rest."""
    plan = make_plan(chunks=chunks, agree=False)
    short, long = ([*range(length)] for length in (end, end + more))
    num_same = sum(a == b for a, b in zip(plan.page_keys(b"", short), plan.page_keys(b"", long), strict=False))
    usable = plan.usable(4 * num_same, end + more)
    assert usable > end - max(chunks)
    if end >= 2 * chunks[-1]:
        assert usable >= end / 2


@given(end=st.integers(0, 200), found=st.integers(0, 50), chunks=CHUNKS, agree=st.booleans())
def test_what_is_used_of_the_cache_ends_where_a_chunk_begins(end, found, chunks, agree):
    plan = make_plan(chunks=chunks, agree=agree)
    num_found = min(4 * found, end // 4 * 4)
    usable = plan.usable(num_found, end)
    assert 0 <= usable <= num_found
    assert agree <= (usable == num_found)
    rest = [*plan.spans(usable, end)]
    assert [position for start, num, _ in rest for position in range(start, start + num)] == [*range(usable, end)]
    if not agree:
        assert rest == [*plan.spans(0, end)][len([*plan.spans(0, end)]) - len(rest) :], "the same programs"


def test_the_name_of_a_page_s_beginning_tells_what_it_depends_on():
    plan, ids = make_plan(anywhere=True), [1, 2, 3, 4, 5, 6]
    keys = plan.page_keys(b"", ids)
    name = plan.part_key(b"", keys, ids)
    others = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 7], [0, 2, 3, 4, 5, 6], [5, 6]]
    assert len({name, *(plan.part_key(b"", plan.page_keys(b"", other), other) for other in others)}) == 5
    assert plan.part_key(b"x", plan.page_keys(b"x", ids), ids) != name
    assert plan.part_key(b"", keys, ids[:4]) == make_plan().part_key(b"", keys, ids) == b""


def test_chunks_depend_on_the_request_alone():
    scheduler, request = make_scheduler(), make_request(50)
    alone = spans_of(scheduler, request)
    for i in range(5):
        scheduler.enqueue(make_request(9 + i, arrival=i + 1))
    scheduler.admit()
    assert spans_of(scheduler, request) == alone


@pytest.mark.parametrize(("agree", "turns"), [(True, [12] * 6 + [4]), (False, [36, 36, 4])])
def test_streams_shorten_the_chunks_that_they_wait_for_where_sizes_are_free(agree, turns):
    """To the middle one of three, a chunk a turn. Where the cut decides about bits it is the same in any company."""
    plan = make_plan(chunks=(4, 12, 36), agree=agree)
    scheduler, stream = make_scheduler(rows=2, pages=60, plan=plan), make_request(2, arrival=1, plan=plan)
    device: Any = FakeDevice(60, agree=agree, num_shards=1)
    placement = Placement(CONFIG, device, scheduler, table_width=60, needs_clean_pages=False)
    long = make_request(77, plan=plan)
    assert [num_tokens for _, num_tokens, _ in spans_of(scheduler, long)] == [36, 36, 4]
    scheduler.enqueue(stream)
    placement.fill_rows()
    assert stream.is_running
    scheduler.enqueue(long)
    done = [0]
    while not long.is_running:
        placement.fill_rows()
        done.append(long.num_prefilled)
    assert np.diff(done).tolist() == turns


@pytest.mark.parametrize("agree", [True, False])
def test_a_page_s_name_tells_all_that_its_bits_depend_on(agree):
    plan = make_plan(chunks=(8, 32), agree=agree)
    ids = [*range(100, 143)]
    keys = plan.page_keys(b"a", ids)
    assert len(keys) == len(set(keys)) == 10
    assert plan.page_keys(b"a", ids) == keys
    assert not set(plan.page_keys(b"b", ids)) & set(keys), "another scope"
    changed = plan.page_keys(b"a", [*ids[:13], 1, *ids[14:]])
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True] * 3 + [False] * 7
    longer = plan.page_keys(b"a", [*ids, *range(40)])
    assert (longer[:10] == keys) == agree
    assert longer[:8] == keys[:8], "the same chunks"
    assert plan.more_keys(plan.root(b"a"), ids) == keys if agree else True


# ---- The prefix cache ----


def test_a_prompt_that_begins_alike_holds_the_same_pages():
    scheduler = make_scheduler(pages=40)
    first = make_request(prompt=[*range(30)], arrival=0)
    second = make_request(prompt=[*range(22), 77, 78, 79], arrival=1)
    scheduler.enqueue(first)
    scheduler.admit()
    prefill(scheduler, first)
    scheduler.enqueue(second)
    scheduler.admit()
    assert second.pages[:5] == first.pages[:5]
    assert not set(second.pages[5:]) & set(first.pages)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 20)
    assert spans_of(scheduler, second) == [(20, 4, 8)]
    assert (scheduler.num_queried_tokens, scheduler.num_hit_tokens) == (55, 20)
    assert scheduler.pools[0].num_used == 8 + 2


def test_endings_of_one_context_copy_the_page_that_it_fills_in_part():
    plan = make_plan(anywhere=True)
    scheduler = make_scheduler(rows=4, plan=plan)
    context = [1] * 11  # two full pages, and two tokens more before the last, which gives the first score
    endings = [make_request(prompt=[*context, i, i], first=11, arrival=i, plan=plan) for i in range(3)]
    other = make_request(prompt=[*context[:9], 2, 1, 7, 7], first=11, arrival=3, plan=plan)
    for request in (*endings, other):
        scheduler.enqueue(request)
    assert scheduler.admit() == []
    assert scheduler.waiting == [*endings[1:], other], "the others wait for the first one's"
    for span in scheduler.spans(endings[0]):
        scheduler.advance(endings[0], span)
    part = endings[0].pages[2]
    assert scheduler.admit() == [(part, request.pages[2]) for request in endings[1:]]
    for request in endings[1:]:
        assert request.pages[:2] == endings[0].pages[:2]
        assert spans_of(scheduler, request) == [(10, 2, 32)]
    assert spans_of(scheduler, other) == [(8, 4, 32)]


def test_another_scope_shares_nothing():
    scheduler = make_scheduler(pages=40)
    for arrival, scope in enumerate((b"", b"key")):
        request = make_request(prompt=[*range(30)], arrival=arrival, scope=scope)
        scheduler.enqueue(request)
        scheduler.admit()
        prefill(scheduler, request)
        assert request.num_cached_tokens == 0


def test_choices_wait_for_the_first_one_s_prefill_and_share_it():
    scheduler = make_scheduler(rows=8, pages=14)
    choices = [make_request(prompt=[*range(41)], arrival=arrival) for arrival in range(4)]
    for request in choices:
        scheduler.enqueue(request)
    scheduler.admit()
    assert [request.row is not None for request in choices] == [True, False, False, False]
    spans = [*scheduler.spans(choices[0])]
    scheduler.advance(choices[0], spans[0])
    scheduler.admit()
    assert choices[1].row is None, "the second chunk is to come"
    prefill(scheduler, choices[0])
    scheduler.admit()
    # Ten pages of prompt, and one for each choice's own tokens: 13 in all.
    assert [request.row is not None for request in choices] == [True, True, True, False]
    assert scheduler.pools[0].num_used == 13
    assert [request.num_cached_tokens for request in choices] == [0, 40, 40, None]
    assert spans_of(scheduler, choices[1]) == []


@pytest.mark.parametrize("agree", [True, False])
def test_a_second_turn_finds_the_first_and_its_answer_if_programs_agree(agree):
    plan = make_plan(chunks=(4,), agree=agree)
    scheduler = make_scheduler(pages=40, plan=plan)
    first = make_request(prompt=[*range(22)], plan=plan)
    scheduler.enqueue(first)
    scheduler.admit()
    prefill(scheduler, first)
    scheduler.grow(first, 40)
    first.generated = [*range(50, 65)]
    scheduler.remove(first)
    second = make_request(prompt=[*first.prompt, *first.generated, 1, 2, 3, 4, 5], plan=plan)
    scheduler.enqueue(second)
    scheduler.admit()
    # All 37 tokens less the last have keys and values: nine full pages; of the prompt alone, five.
    assert second.num_cached_tokens == (36 if agree else 20)


def test_a_request_cancelled_before_its_first_token_leaves_nothing_to_be_found():
    scheduler = make_scheduler(pages=40)
    first, second = (make_request(prompt=[*range(30)], arrival=i) for i in range(2))
    scheduler.enqueue(first)
    scheduler.admit()
    prefill(scheduler, first)
    held = list(first.pages)
    assert sorted(scheduler.remove(first)) == sorted(held)
    scheduler.enqueue(second)
    scheduler.admit()
    assert second.num_cached_tokens == 0


# ---- Order ----


def test_the_line_is_by_priority_then_arrival():
    scheduler = make_scheduler(rows=1)
    for arrival, priority in enumerate([5, 0, -2, 0, 5]):
        scheduler.enqueue(make_request(3, priority=priority, arrival=arrival))
    assert [r.arrival for r in scheduler.waiting] == [2, 1, 3, 0, 4]


def test_nobody_overtakes_a_request_that_waits_for_pages():
    """A large request at the head of the line is not starved by small ones behind it."""
    scheduler = make_scheduler(rows=4, pages=11)
    holder = make_request(30, arrival=0)
    scheduler.enqueue(holder)
    scheduler.admit()
    scheduler.enqueue(make_request(20, arrival=1))
    scheduler.enqueue(make_request(1, arrival=2))
    scheduler.admit()
    assert [r.arrival for r in scheduler.waiting] == [1, 2]
    scheduler.remove(holder)
    scheduler.admit()
    assert not scheduler.waiting


def test_a_request_set_aside_keeps_its_place_and_what_it_said():
    scheduler = make_scheduler(rows=2)
    first, second, third = (make_request(5, arrival=i) for i in range(3))
    for request in (first, second, third):
        scheduler.enqueue(request)
    scheduler.admit()
    second.is_running, second.generated = True, [7, 8]
    assert scheduler.youngest(0) is second
    scheduler.set_aside(second)
    assert scheduler.waiting == [second, third]
    assert (second.row, second.pages, second.is_running, second.generated) == (None, [], False, [7, 8])
    scheduler.admit()
    assert second.row is not None
    assert len(second.pages) == 2, "seven tokens and the next"


def test_who_was_set_aside_comes_back_with_room_for_a_dispatch():
    """Or it would be copied to the host and back for a few tokens."""
    for budget, num_pages in ((100, 12), (18, 7)):
        scheduler = make_scheduler(pages=30)
        request = make_request(9, budget=budget)
        request.generated, request.saved_as = [1] * 6, 0
        scheduler.enqueue(request)
        scheduler.admit()
        # 14 tokens have keys and values; 32 more may come, or what is left of the budget.
        assert len(request.pages) == num_pages


def decode(scheduler: Scheduler, request: EngineRequest, num_tokens: int) -> list[int]:
    """Generates tokens one by one, and returns how many pages were held beside each."""
    held = []
    for token in range(num_tokens):
        assert scheduler.release_unreachable(request) == [], "they are known to be finite"
        assert scheduler.grow(request, len(request.prompt) + len(request.generated) + 1)
        held.append(scheduler.pools[0].num_used)
        request.generated.append(token)
    return held


def test_pages_before_every_layer_s_window_are_given_back():
    scheduler = make_scheduler(pages=500, window=50)
    request = make_request(301, budget=700)
    scheduler.enqueue(request)
    scheduler.admit()
    prefill(scheduler, request)
    held = decode(scheduler, request, 600)
    assert held[0] == 76, "nothing before the first token"
    # The window, a block of 128 that is seen in part, and a page begun at each end.
    assert max(held[1:]) <= (50 + 128) // 4 + 2
    assert len(request.pages) == 226, "the table keeps its places"
    assert not any(request.pages[: request.num_released])
    assert len(scheduler.remove(request)) == 1, "the page that is not full"
    assert scheduler.pools[0].num_used == 0


def test_pages_that_were_given_back_are_found_by_those_who_begin_alike():
    scheduler = make_scheduler(pages=500, window=50)
    first = make_request(301, budget=700)
    scheduler.enqueue(first)
    scheduler.admit()
    prefill(scheduler, first)
    decode(scheduler, first, 200)
    again = make_request(prompt=[*first.prompt, *first.generated[:100], 9])
    scheduler.enqueue(again)
    scheduler.admit()
    assert again.num_cached_tokens == 384, "three blocks of 128; the rest has no name yet"
    assert len(set(again.pages)) == len(again.pages)
    scheduler.remove(first)
    scheduler.remove(again)
    assert scheduler.pools[0].num_used == 0


def test_pages_whose_numbers_reached_no_score_are_cleaned_and_not_found():
    """A NaN there would have failed nobody: it must not come to another row, nor to who begins alike."""
    scheduler = make_scheduler(pages=500, window=50, reach=98)
    request = make_request(301, budget=700)
    scheduler.enqueue(request)
    scheduler.admit()
    prefill(scheduler, request)
    request.generated.append(1)
    unclean = scheduler.release_unreachable(request)
    # 251 tokens are not seen any more, in whole blocks 128; the first score knows of those from 202 on.
    assert len(unclean) == 32
    assert scheduler.pools[0].find(request.page_keys) == []
    request.generated += range(250)
    assert len(scheduler.release_unreachable(request)) == (204 - 128) // 4, "those after them are known"


def test_who_was_set_aside_brings_only_the_window_back():
    scheduler = make_scheduler(pages=500, window=50)
    request = make_request(301, budget=700)
    scheduler.enqueue(request)
    scheduler.admit()
    prefill(scheduler, request)
    decode(scheduler, request, 200)
    scheduler.release_unreachable(request)
    copied = request.pages[request.num_released : scheduler.num_pages_for(request.num_to_prefill)]
    request.saved_as = 0
    scheduler.set_aside(request)
    assert scheduler.pools[0].num_used == 0
    scheduler.admit()
    assert len(request.pages[request.num_released : scheduler.num_pages_for(request.num_to_prefill)]) == len(copied)
    assert scheduler.pools[0].num_used == len(request.pages) - request.num_released
    assert not any(request.pages[: request.num_released])
    assert all(request.pages[request.num_released :])


def test_removing_twice_or_from_the_line_is_fine():
    scheduler = make_scheduler(rows=1)
    running, waiting = make_request(5, arrival=0), make_request(5, arrival=1)
    scheduler.enqueue(running)
    scheduler.enqueue(waiting)
    scheduler.admit()
    scheduler.remove(waiting)
    assert scheduler.has_work
    scheduler.remove(running)
    scheduler.remove(running)
    assert not scheduler.has_work
    assert scheduler.pools[0].num_used == 0
    assert waiting.is_finished
    assert running.is_finished


# ---- Shards of a mesh ----


def test_a_request_goes_where_its_prompt_is_and_else_where_most_pages_are_free():
    scheduler = make_scheduler(rows=4, pages=20, shards=2)
    stem = [*range(100, 116)]
    first = make_request(prompt=[*stem, 1], arrival=0)
    scheduler.enqueue(first)
    scheduler.admit()
    prefill(scheduler, first)
    other = make_request(9, arrival=1)
    alike = make_request(prompt=[*stem, 2], arrival=2)
    scheduler.enqueue(other)
    scheduler.enqueue(alike)
    scheduler.admit()
    assert (first.shard, first.row) == (0, 0)
    assert (other.shard, other.row) == (1, 2), "shard 1 has more pages to spare"
    assert (alike.shard, alike.row) == (0, 1)
    assert alike.pages[:4] == first.pages[:4]
    third = make_request(prompt=[*stem, 3], arrival=3)
    scheduler.enqueue(third)
    scheduler.admit()
    assert (third.shard, third.row, third.num_prefilled) == (1, 3, 0), "where its prompt is no row is free"


def test_a_shard_without_pages_sets_its_own_youngest_aside():
    scheduler = make_scheduler(rows=4, pages=6, shards=2)
    requests = [make_request(7, budget=20, arrival=arrival) for arrival in range(4)]
    for request in requests:
        scheduler.enqueue(request)
    scheduler.admit()
    prefill(scheduler, *requests)
    assert [request.shard for request in requests] == [0, 1, 0, 1]
    assert scheduler.grow(requests[0], 12)
    assert not scheduler.grow(requests[0], 16)
    assert scheduler.youngest(0) is requests[2]
    assert scheduler.youngest(1) is requests[3]
    assert scheduler.grow(requests[1], 12), "the other shard has pages"


# ---- Every order of events ----

PAGE, CONTEXT, BLOCK = 4, 40, 8
NAN, POISON = -1, 3
CONFIG = tiny.config_of("divisible")


def bits(before: int, token: int, program: object) -> int:
    """What stands for a token's keys and values, and for the scores that come of them."""
    return NAN if before == NAN or token == POISON else abs(hash((before, token, program)))


class HostArray(np.ndarray):
    """What stands for a device's array."""

    def copy_to_host_async(self) -> None:
        """It is there."""


class FakeDevice:
    """`Programs` over numbers: each slot of a page holds `bits` of the token and of what is before it."""

    def __init__(self, num_pages: int, *, agree: bool, num_shards: int, places: ChunkPlaces | None = None) -> None:
        self.places = places or ChunkPlaces(defaultdict(lambda: 1))
        self.memory = np.zeros((num_shards, num_pages, PAGE), np.int64)
        self.agree = agree
        self.saved: dict[int, np.ndarray] = {}

    def put(self, table: Any, position: int, token: int, program: object, shard: int) -> int:
        memory = self.memory[shard]
        before = 0 if position == 0 else int(memory[table[(position - 1) // PAGE], (position - 1) % PAGE])
        assert table[position // PAGE] > 0, "a row without a page"
        value = bits(before, token, None if self.agree else program)
        memory[table[position // PAGE], position % PAGE] = value
        return value

    def values(self, request: EngineRequest, num_tokens: int) -> list[int]:
        """What the slots of the request's pages hold, of those that it has still."""
        memory, first = self.memory[request.shard], request.num_released * PAGE
        return [int(memory[request.pages[i // PAGE], i % PAGE]) for i in range(first, num_tokens)]

    def run(self, call: Any) -> Any:
        match call:
            case Score((table, shard), (tokens, start, num_tokens), _):
                values = [
                    self.put(table, int(start) + i, int(tokens[i]), (int(start), len(tokens)), int(shard))
                    for i in range(num_tokens)
                ]
                logprobs = np.where(np.array(values) == NAN, np.nan, -1.0)
                ids, none = np.zeros((len(values), 1), np.int32), np.zeros((len(values), 1))
                return Scores(*(part.view(HostArray) for part in (logprobs, ids[:, 0], ids, none)))
            case CopyPage(source, target):
                assert source > 0
                assert target > 0
                self.memory[0, target] = self.memory[0, source]
            case Prefill(place, chunk):
                in_turn = [(*place, *chunk)] if chunk.tokens.ndim == 1 else [*zip(*place, *chunk, strict=True)]
                size = chunk.tokens.shape[-1]
                assert len(in_turn) == self.places.num_chunks(size)
                assert any(num_tokens for *_, num_tokens in in_turn), "a call for nothing"
                for index, (table, shard, tokens, start, num_tokens) in enumerate(in_turn):
                    group = int(shard) * self.places.num_groups // len(self.memory)
                    assert num_tokens == 0 or group == index // self.places.in_group[size], "another group's chunk"
                    for i in range(num_tokens):
                        self.put(table, int(start) + i, int(tokens[i]), (int(start), size), int(shard))
            case ClearPages(pages, num_pages, shard):
                self.memory[shard, pages[:num_pages]] = 0
            case SavePages(name, pages, shard):
                assert 0 not in pages
                self.saved[int(name)] = self.memory[shard, pages]
            case RestorePages(name, pages, shard):
                saved = self.saved.pop(int(name))
                self.memory[shard, pages[pages > 0]] = saved[pages > 0]
            case ForgetPages(name):
                del self.saved[int(name)]
            case _:
                assert isinstance(call, Insert)


class Life(RuleBasedStateMachine):
    """Plays the engine over numbers: the same calls, in any order that hypothesis finds."""

    @initialize(
        rows=st.integers(1, 4),
        spare=st.integers(0, 12),
        agree=st.booleans(),
        shards=st.sampled_from([1, 1, 2, 3]),
        window=st.sampled_from([None, 2, 7]),
        in_group=st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 2)]),
        has_groups=st.booleans(),
        anywhere=st.booleans(),
    )
    def start(self, rows, spare, agree, shards, window, in_group, has_groups, anywhere):
        """Groups have a shard each, or one has all: `data` of a mesh, or `rep`. Where chunks start anywhere, pages are
        copied and none is cleared: attention reads nothing past the end."""
        self.num_pages = 1 + CONTEXT // PAGE + spare
        self.is_clean = not anywhere
        agree, shards = (True, 1) if anywhere else (agree, shards)
        self.plan = make_plan(chunks=(4, 12), agree=agree, anywhere=anywhere)
        self.window = window
        sizes = {"rows": rows * shards, "pages": self.num_pages, "shards": shards}
        self.scheduler = make_scheduler(plan=self.plan, window=window, read_tokens=BLOCK, **sizes)
        places = ChunkPlaces(dict(zip((4, 12), in_group, strict=True)), shards if has_groups else 1)
        self.device: Any = FakeDevice(self.num_pages, agree=agree, num_shards=shards, places=places)
        self.placement = Placement(
            CONFIG,
            self.device,
            self.scheduler,
            table_width=2 * CONTEXT // PAGE,
            needs_clean_pages=self.is_clean,
            places=places,
        )
        self.live: list[EngineRequest] = []
        self.arrivals = itertools.count()

    @rule(
        data=st.data(),
        length=st.integers(1, CONTEXT - 1),
        budget=st.integers(1, CONTEXT),
        priority=st.integers(-1, 1),
        times=st.integers(1, 3),
        scope=st.sampled_from([b"", b"", b"x"]),
        scores=st.booleans(),
    )
    def submit(self, data, length, budget, priority, times, scope, scores):
        """`times` as choices of one request, or as endings of one context that are scored. Prompts are alike, and may
        go on where another request has come to."""
        others = [[*request.prompt, *request.generated] for request in self.live]
        stem = data.draw(st.sampled_from([[0] * CONTEXT, [0, 1] * CONTEXT, *others]))
        prompt = (stem + [0] * length)[:length]
        if data.draw(st.integers(0, 5)) == 0:
            prompt[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(1, POISON))
        first = data.draw(st.integers(1, length - 1)) if scores and length > 1 else None
        for ending in range(times):
            request = make_request(
                prompt=prompt if first is None else [*prompt[:first], *([ending] * (length - first))],
                budget=1 if first else min(budget, CONTEXT - length),
                priority=priority,
                arrival=next(self.arrivals),
                scope=scope if self.plan.programs_agree or first is None else scope + b"scores",
                plan=self.plan,
                first=first,
            )
            self.scheduler.enqueue(request)
            self.live.append(request)

    @rule()
    def fill_rows(self):
        before = list(self.scheduler.waiting)
        self.placement.fill_rows()
        admitted = [request for request in before if request.row is not None]
        assert before[: len(admitted)] == admitted, "somebody was overtaken"
        assert self.scheduler.waiting == before[len(admitted) :]

    @rule()
    def read_scores(self):
        while self.placement.scored:
            scored = self.placement.scored.popleft()
            if scored.request.is_finished:
                continue
            output = scored.take()
            if output.finish_reason is not None:
                request = scored.request
                assert (output.finish_reason == "error") == (NAN in self.device.values(request, request.num_prefilled))
                self.finish(request, has_failed=output.finish_reason == "error")

    def alone(self, request: EngineRequest) -> list[int]:
        """What the request's pages would hold if nobody else were there."""
        values: list[int] = []
        for start, num_tokens, size in self.plan.spans(0, len(request.prompt) - 1):
            for token in request.prompt[start : start + num_tokens]:
                values.append(
                    bits(values[-1] if values else 0, token, None if self.plan.programs_agree else (start, size))
                )
        for token in [request.prompt[-1], *request.generated][: len(request.generated)]:
            program = None if self.plan.programs_agree else "decode"
            values.append(bits(values[-1] if values else 0, token, program))
        return values

    @rule(steps=st.integers(1, 5))
    def decode(self, steps):
        if not self.scheduler.running:
            return
        holders = [request for request in self.scheduler.rows if request is not None]
        oldest = min(holders, key=lambda r: r.order)
        for request in self.scheduler.running:
            self.placement.release_unreachable(request)
        for request in sorted(self.scheduler.running, key=lambda r: r.order):
            while request.is_running:
                more = min(steps, request.budget - len(request.generated))
                if self.scheduler.grow(request, len(request.prompt) + len(request.generated) + more):
                    break
                victim = self.scheduler.youngest(request.shard)
                assert victim is not oldest, "the oldest was set aside"
                own = [r for r in self.scheduler.rows if r is not None and r.shard == request.shard]
                assert victim.order == max(r.order for r in own)
                self.placement.set_aside(victim)
        for request in self.scheduler.running:
            for _ in range(min(steps, request.budget - len(request.generated))):
                if not self.step(request):
                    self.finish(request, has_failed=True)
                    break
            if self.window is not None and request.is_running and len(request.generated) > steps:
                last = request.num_to_prefill - steps
                assert request.num_released >= (last - self.window - BLOCK) // PAGE, "pages that nobody reads"
            if len(request.generated) == request.budget:
                self.finish(request)

    def step(self, request: EngineRequest) -> bool:
        """Writes the last token and says the next, which depends on all before. False if they are not finite."""
        last = [*request.prompt, *request.generated][-1]
        scores = self.device.put(request.pages, request.num_to_prefill, last, "decode", request.shard)
        if scores == NAN:
            return False
        request.generated.append(scores % POISON)
        return True

    def finish(self, request: EngineRequest, *, has_failed: bool = False) -> None:
        if not has_failed and request.is_running:
            written = request.num_to_prefill
            assert self.device.values(request, written) == self.alone(request)[request.num_released * PAGE :]
        self.placement.forget(request)
        self.placement.clear(request, self.scheduler.remove(request, has_failed=has_failed))
        self.live.remove(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        """While a dispatch runs, which writes on, and what it writes may be NaN."""
        request = data.draw(st.sampled_from(self.live))
        if request.is_running:
            self.device.put(request.pages, request.num_to_prefill, POISON, "decode", request.shard)
        self.finish(request)

    @invariant()
    def pages_are_shared_through_the_cache_alone(self):
        if not hasattr(self, "scheduler"):
            return
        for shard, pages in enumerate(self.scheduler.pools):
            self.pages_of_a_shard_are(pages, [request for request in self.live if request.shard == shard])

    def pages_of_a_shard_are(self, pages: PagePool, live: list[EngineRequest]) -> None:
        holders = Counter(page for request in live for page in request.pages[request.num_released :])
        assert set(holders) <= set(range(1, self.num_pages))
        assert pages._holders == [holders[page] for page in range(self.num_pages)]
        assert pages.num_used == len(holders), "pages leaked"
        assert pages.num_free == self.num_pages - 1 - len(holders)
        for request in live:
            given_back, held = request.pages[: request.num_released], request.pages[request.num_released :]
            assert not any(given_back)
            assert len(set(held)) == len(held)
            for index, page in enumerate(held, len(given_back)):
                assert holders[page] == 1 or index < len(request.page_keys), "a page that is written has two holders"
        assert len({*pages._free, *pages._idle}) == len(pages._free) + len(pages._idle) == pages.num_free
        assert {page: key for page, key in enumerate(pages._keys) if key} == {p: k for k, p in pages._by_key.items()}

    @invariant()
    def rows_hold_what_they_would_alone(self):
        if not hasattr(self, "scheduler"):
            return
        for request in self.live:
            if request.row is None:
                continue
            written = request.num_to_prefill if request.is_running else request.num_prefilled
            values = self.device.values(request, written)
            assert request.is_saved or values == self.alone(request)[request.num_released * PAGE : written]
            assert request.is_saved or NAN not in values or POISON in request.prompt

    @invariant()
    def what_nobody_holds_is_finite(self):
        if hasattr(self, "scheduler") and self.is_clean:
            for memory, pages in zip(self.device.memory, self.scheduler.pools, strict=True):
                assert NAN not in memory[[*pages._free, *pages._idle]]

    @invariant()
    def everybody_is_in_one_place(self):
        if not hasattr(self, "scheduler"):
            return
        in_rows = [request for request in self.scheduler.rows if request is not None]
        assert sorted(map(id, [*in_rows, *self.scheduler.waiting])) == sorted(map(id, self.live))
        rows_per_shard = len(self.scheduler.rows) // len(self.scheduler.pools)
        for request in in_rows:
            assert request.row is not None
            assert self.scheduler.rows[request.row] is request
            assert request.row // rows_per_shard == request.shard
        for request in self.scheduler.waiting:
            assert (request.row, request.pages, request.is_running) == (None, [], False)
        assert [r.order for r in self.scheduler.waiting] == sorted(r.order for r in self.scheduler.waiting)
        assert self.scheduler.has_work == bool(self.live)
        assert set(self.device.saved) == {r.saved_as for r in self.live if r.is_saved}, "copies leaked"

    def teardown(self):
        """Whatever happened, all that is left comes to its end, the first in order among those with rows first."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(60 * (len(self.live) + 1)):
            if not self.live:
                break
            self.fill_rows()
            holders = [request for request in self.scheduler.rows if request is not None]
            oldest = min(holders, key=lambda r: r.order)
            before = len(oldest.generated), oldest.num_prefilled
            self.fill_rows()
            self.read_scores()
            # Who was admitted just now may come before it, and be given its pages.
            holders = [request for request in self.scheduler.rows if request is not None]
            is_oldest = bool(holders) and oldest is min(holders, key=lambda r: r.order)
            self.decode(3)
            after = len(oldest.generated), oldest.num_prefilled
            has_progress = oldest not in self.live or after > before or oldest.is_running
            assert has_progress or not is_oldest, "the oldest made no progress"
            self.pages_are_shared_through_the_cache_alone()
            self.rows_hold_what_they_would_alone()
            self.everybody_is_in_one_place()
        assert not self.live, "some never ended"
        assert all(pool.num_used == 0 for pool in self.scheduler.pools)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
