"""Who runs when: the host's decisions, without JAX.

A request waits, is admitted to a row (its prompt's pages are taken), is prefilled chunk by chunk, and runs. Pages for
its output are taken as it grows. When none are left, the youngest request is set aside: it gives its pages back and
waits again in its place in the order, with what it has generated kept as part of its prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxllama.engine.pages import PageAllocator
from jaxllama.engine.request import EngineRequest


@dataclass(frozen=True)
class Chunk:
    """Tokens `start … start + num_tokens` of a request, to run in a program made for `size` tokens."""

    request: EngineRequest
    start: int
    num_tokens: int
    size: int


class Scheduler:
    """Rows, pages and the queue. Not thread-safe: the engine's thread alone uses it."""

    def __init__(self, *, num_rows: int, num_pages: int, page_size: int, chunk_sizes: Sequence[int]) -> None:
        self.rows: list[EngineRequest | None] = [None] * num_rows
        self.waiting: list[EngineRequest] = []
        self.pages = PageAllocator(num_pages)
        self._page_size = page_size
        self._chunk_sizes = tuple(sorted(chunk_sizes))

    @property
    def running(self) -> list[EngineRequest]:
        """Requests that decode, by row."""
        return [request for request in self.rows if request is not None and request.is_running]

    @property
    def prefilling(self) -> list[EngineRequest]:
        """Admitted requests whose prompt is not in the cache yet, first come first."""
        return sorted((r for r in self.rows if r is not None and not r.is_running), key=lambda r: r.order)

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting) or any(request is not None for request in self.rows)

    def enqueue(self, request: EngineRequest) -> None:
        """Puts a request in line: by priority, then by arrival."""
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.order)

    def admit(self) -> None:
        """Gives rows, and pages for their prompts, to waiting requests in order, while there are any."""
        while self.waiting and None in self.rows:
            request = self.waiting[0]
            pages = self.pages.take(self._num_pages_for(request.num_to_prefill + 1))
            if pages is None:
                return
            self.waiting.pop(0)
            request.row, request.pages, request.num_prefilled = self.rows.index(None), pages, 0
            self.rows[request.row] = request
            if request.queued_s is None:
                request.queued_s = time.monotonic() - request.made_at

    def chunks(self, request: EngineRequest) -> Iterator[Chunk]:
        """The chunks that a request's prefill still needs. Their sizes depend on its own length alone."""
        start, end = request.num_prefilled, request.num_to_prefill
        while start < end:
            size = next((size for size in self._chunk_sizes if size >= end - start), self._chunk_sizes[-1])
            num_tokens = min(size, end - start)
            yield Chunk(request, start, num_tokens, size)
            start += num_tokens

    def grow(self, request: EngineRequest, num_tokens: int) -> bool:
        """Makes sure that `request` has pages for `num_tokens` in all. False if the pool is exhausted."""
        missing = self._num_pages_for(num_tokens) - len(request.pages)
        if missing <= 0:
            return True
        pages = self.pages.take(missing)
        if pages is None:
            return False
        request.pages += pages
        return True

    def youngest(self) -> EngineRequest:
        """The request to set aside when pages run out: of those with a row, the last in order."""
        return max((request for request in self.rows if request is not None), key=lambda r: r.order)

    def set_aside(self, request: EngineRequest) -> None:
        """Takes a request's row and pages; it waits again in its old place in the order."""
        self._release(request)
        request.is_running = False
        self.enqueue(request)

    def remove(self, request: EngineRequest) -> None:
        """Forgets a request that has ended, wherever it is."""
        if request.row is not None:
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.is_running = False
        request.is_finished = True

    def _release(self, request: EngineRequest) -> None:
        assert request.row is not None
        self.rows[request.row] = None
        self.pages.give_back(request.pages)
        request.row, request.pages = None, []

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)
