"""The scheduler's laws in any order of events: a page has one owner, the line is kept, the first always advances."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxllama.engine.pages import PageAllocator
from jaxllama.engine.request import EngineRequest
from jaxllama.engine.scheduler import Scheduler
from jaxllama.sampling import SamplingParams


def make_request(length: int, *, budget: int = 10, priority: int = 0, arrival: int = 0) -> EngineRequest:
    return EngineRequest(
        prompt=[0] * length,
        params=SamplingParams(),
        on_output=pytest.fail,
        budget=budget,
        stop_ids=frozenset(),
        priority=priority,
        arrival=arrival,
        wake=lambda: None,
    )


def make_scheduler(
    *, rows: int = 3, pages: int = 20, page_size: int = 4, chunks: tuple[int, ...] = (8, 32)
) -> Scheduler:
    return Scheduler(num_rows=rows, num_pages=pages, page_size=page_size, chunk_sizes=chunks)


# ---- Pages ----


def test_page_zero_is_never_given_away():
    pages = PageAllocator(7)
    assert sorted(pages.take(6) or []) == [1, 2, 3, 4, 5, 6]


def test_taking_too_many_takes_none():
    pages = PageAllocator(7)
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
    pages = PageAllocator(20)
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


# ---- Chunks ----


CHUNKS = st.sampled_from([(8, 32), (4,), (16, 48, 128), (64,)])


@given(length=st.integers(1, 300), generated=st.integers(0, 40), chunks=CHUNKS)
def test_chunks_cover_all_but_the_last_token_once(length, generated, chunks):
    scheduler = make_scheduler(chunks=chunks)
    request = make_request(length)
    request.generated = [0] * generated
    made = list(scheduler.chunks(request))
    covered = [position for chunk in made for position in range(chunk.start, chunk.start + chunk.num_tokens)]
    assert covered == list(range(length + generated - 1))
    for chunk in made:
        assert chunk.size in chunks
        assert chunk.start % 4 == 0
        assert 0 < chunk.num_tokens <= chunk.size
        # No larger than it must be.
        smaller = [size for size in chunks if size < chunk.size]
        assert not smaller or chunk.num_tokens > max(smaller)


def test_chunks_depend_on_the_request_alone():
    scheduler, request = make_scheduler(), make_request(50)
    alone = [(c.start, c.num_tokens, c.size) for c in scheduler.chunks(request)]
    for i in range(5):
        scheduler.enqueue(make_request(9 + i, arrival=i + 1))
    scheduler.admit()
    assert [(c.start, c.num_tokens, c.size) for c in scheduler.chunks(request)] == alone


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
    assert scheduler.youngest() is second
    scheduler.set_aside(second)
    assert scheduler.waiting == [second, third]
    assert (second.row, second.pages, second.is_running, second.generated) == (None, [], False, [7, 8])
    scheduler.admit()
    assert second.row is not None
    assert sum(chunk.num_tokens for chunk in scheduler.chunks(second)) == 6


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
    assert scheduler.pages.num_used == 0
    assert waiting.is_finished
    assert running.is_finished


# ---- Every order of events ----

PAGE, CONTEXT = 4, 40


class Life(RuleBasedStateMachine):
    """Plays the engine without a device: the same calls, in any order that hypothesis finds."""

    @initialize(rows=st.integers(1, 4), spare=st.integers(0, 12))
    def start(self, rows, spare):
        self.num_pages = 1 + CONTEXT // PAGE + spare
        self.scheduler = make_scheduler(rows=rows, pages=self.num_pages, page_size=PAGE, chunks=(4, 12))
        self.live: list[EngineRequest] = []
        self.arrivals = itertools.count()

    @rule(length=st.integers(1, CONTEXT - 1), budget=st.integers(1, CONTEXT), priority=st.integers(-1, 1))
    def submit(self, length, budget, priority):
        request = make_request(
            length, budget=min(budget, CONTEXT - length), priority=priority, arrival=next(self.arrivals)
        )
        self.scheduler.enqueue(request)
        self.live.append(request)

    @rule()
    def admit(self):
        before = list(self.scheduler.waiting)
        self.scheduler.admit()
        admitted = [request for request in before if request.row is not None]
        assert before[: len(admitted)] == admitted, "somebody was overtaken"
        assert self.scheduler.waiting == before[len(admitted) :]

    @rule(num_chunks=st.integers(1, 3))
    def prefill(self, num_chunks):
        for request in self.scheduler.prefilling:
            for chunk in self.scheduler.chunks(request):
                if not num_chunks:
                    return
                num_chunks -= 1
                # Whole pages are written, so the row must hold them.
                assert -(-(chunk.start + chunk.num_tokens) // PAGE) <= len(request.pages)
                request.num_prefilled += chunk.num_tokens
            request.is_running = True

    @rule(steps=st.integers(1, 5))
    def decode(self, steps):
        if not self.scheduler.running:
            return
        holders = [request for request in self.scheduler.rows if request is not None]
        oldest = min(holders, key=lambda r: r.order)
        for request in sorted(self.scheduler.running, key=lambda r: r.order):
            while request.is_running:
                more = min(steps, request.budget - len(request.generated))
                if self.scheduler.grow(request, len(request.prompt) + len(request.generated) + more):
                    break
                victim = self.scheduler.youngest()
                assert victim is not oldest, "the oldest was set aside"
                assert victim.order == max(r.order for r in self.scheduler.rows if r is not None)
                self.scheduler.set_aside(victim)
        for request in self.scheduler.running:
            more = min(steps, request.budget - len(request.generated))
            assert len(request.pages) * PAGE >= len(request.prompt) + len(request.generated) + more
            request.generated += [1] * more
            if len(request.generated) == request.budget:
                self.finish(request)

    def finish(self, request: EngineRequest) -> None:
        self.scheduler.remove(request)
        self.live.remove(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.finish(data.draw(st.sampled_from(self.live)))

    @invariant()
    def pages_have_one_owner(self):
        if not hasattr(self, "scheduler"):
            return
        owned = [page for request in self.live for page in request.pages]
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert set(owned) <= set(range(1, self.num_pages))
        assert self.scheduler.pages.num_used == len(owned), "pages leaked"
        assert self.scheduler.pages.num_free == self.num_pages - 1 - len(owned)

    @invariant()
    def everybody_is_in_one_place(self):
        if not hasattr(self, "scheduler"):
            return
        in_rows = [request for request in self.scheduler.rows if request is not None]
        assert sorted(map(id, [*in_rows, *self.scheduler.waiting])) == sorted(map(id, self.live))
        assert all(self.scheduler.rows[request.row or 0] is request for request in in_rows)
        for request in self.scheduler.waiting:
            assert (request.row, request.pages, request.is_running) == (None, [], False)
        assert [r.order for r in self.scheduler.waiting] == sorted(r.order for r in self.scheduler.waiting)
        assert self.scheduler.has_work == bool(self.live)

    def teardown(self):
        """Whatever happened, all that is left comes to its end, the first in order among those with rows first."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(60 * (len(self.live) + 1)):
            if not self.live:
                break
            self.admit()
            self.prefill(99)
            holders = [request for request in self.scheduler.rows if request is not None]
            oldest = min(holders, key=lambda r: r.order)
            before = len(oldest.generated)
            self.decode(3)
            assert oldest.is_finished or len(oldest.generated) > before, "the oldest made no progress"
            self.pages_have_one_owner()
            self.everybody_is_in_one_place()
        assert not self.live, "some never ended"


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
