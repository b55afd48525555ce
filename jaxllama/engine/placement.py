"""Requests into rows and out of them: prefill, what is set aside and brought back, and pages left clean."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from jaxllama.decode.state import Chunk, Place, any_row, row_state
from jaxllama.engine.calls import (
    ClearPages,
    CopyPage,
    ForgetPages,
    Insert,
    Prefill,
    PrefillDraft,
    Programs,
    RestorePages,
    SavePages,
)
from jaxllama.engine.scheduling.chunks import Span
from jaxllama.engine.scheduling.request import EngineRequest
from jaxllama.engine.scheduling.scheduler import PageCopy, Scheduler
from jaxllama.engine.scheduling.sharing import ChunkPlaces, SharedCalls
from jaxllama.engine.scores import ScoredSpan
from jaxllama.model.config import LlamaConfig


class Placement:
    """Carries out on the devices what the scheduler decides about rows. The engine's thread alone uses it.

    If `needs_clean_pages` (see `Platform`), pages that may hold NaN are cleared when they become free; all others are
    finite. With `has_draft` a draft model's cache is filled beside the model's. A call of prefill has as many chunks as
    `places` says: one by one where it is None.
    """

    def __init__(
        self,
        config: LlamaConfig,
        programs: Programs,
        scheduler: Scheduler,
        *,
        table_width: int,
        needs_clean_pages: bool,
        history_size: int = 0,
        has_draft: bool = False,
        places: ChunkPlaces | None = None,
    ) -> None:
        self._config = config
        self._programs = programs
        self._scheduler = scheduler
        self._table_width = table_width
        self._needs_clean_pages = needs_clean_pages
        self._history_size = history_size
        self._has_draft = has_draft
        self._places = places or ChunkPlaces(dict.fromkeys(scheduler.chunk_sizes, 1))
        self._chunks: SharedCalls[tuple[Place, Chunk]] = SharedCalls(self._places)
        self._draft_chunks: SharedCalls[tuple[Place, Chunk]] = SharedCalls(self._places)
        self._numbers = itertools.count()
        self.scored: deque[ScoredSpan] = deque()
        """What is launched and not read, oldest first."""

    def fill_rows(self) -> None:
        """Admits waiting requests, and prefills no more tokens of each group than running streams may wait for."""
        tokens_left = [self._scheduler.max_prefill_tokens] * self._places.num_groups
        full: set[int] = set()
        while True:
            # Once more after each request: the next one may be waiting for the pages that it fills.
            self._copy(self._scheduler.admit())
            request = next((r for r in self._scheduler.prefilling if self._group(r) not in full), None)
            if request is None:
                break
            group = self._group(request)
            if request.saved_as is not None:
                self._bring_back(request, request.saved_as)
            for span in self._scheduler.spans(request):
                if (cost := self._scheduler.cost(span)) > tokens_left[group]:
                    full.add(group)
                    break
                tokens_left[group] -= cost
                self._prefill(request, span)
                self._scheduler.advance(request, span)
                self._prefill_draft(request)
            if request.num_prefilled >= request.num_to_prefill and request.scoring is None:
                self._prefill_draft(request)
                self.activate(request)
        self._launch(waits=False)

    def _copy(self, copies: list[PageCopy]) -> None:
        """Makes them at once: what is launched later may write to where they are from."""
        if copies:
            self._launch(waits=False)
        for source, target in copies:
            self._programs.run(CopyPage(np.int32(source), np.int32(target)))

    def run_each(self) -> None:
        """Runs what moves rows and pages once, on row 0 and page 0, before any request."""
        zero, none = np.int32(0), np.zeros(1, np.int32)
        self._programs.run(Insert(zero, any_row(self._config, self._history_size)))
        self._programs.run(SavePages(zero, none, zero))
        self._programs.run(RestorePages(zero, none, zero))
        if self._scheduler.copies_pages:
            self._programs.run(CopyPage(zero, zero))
        if self._needs_clean_pages:
            self._programs.run(ClearPages(np.zeros(self._table_width, np.int32), zero, zero))

    def prefill(self, request: EngineRequest, span: Span) -> None:
        """Writes `span` of a request's prompt into the cache."""
        self._prefill(request, span)
        self._launch(waits=False)

    def prefill_draft(self, request: EngineRequest, span: Span) -> None:
        """Writes `span` of a request's tokens into the draft model's cache."""
        self._put(self._draft_chunks, request, request.prompt + request.generated, span)
        self._launch(waits=False)

    def _prefill(self, request: EngineRequest, span: Span) -> None:
        """The same, sooner or later: before `fill_rows` ends."""
        if request.scoring is None:
            self._put(self._chunks, request, request.prompt, span)
            self._launch(waits=True)
            return
        place, chunk = self._chunk(request, request.prompt, span)
        self._launch(waits=False)  # it may attend to what they write
        if (scored := ScoredSpan.launch(self._programs, request, span, place, chunk)) is not None:
            self.scored.append(scored)

    def _prefill_draft(self, request: EngineRequest) -> None:
        """All that the draft model's cache lacks of what the model's has. What was found or saved may have no more."""
        if self._has_draft and request.scoring is None:
            for span in self._scheduler.advance_draft(request):
                self._put(self._draft_chunks, request, request.prompt + request.generated, span)
            self._launch(waits=True)

    def _put(
        self, chunks: SharedCalls[tuple[Place, Chunk]], request: EngineRequest, ids: list[int], span: Span
    ) -> None:
        chunks.put(self._group(request), span.size, self._chunk(request, ids, span))

    def _launch(self, *, waits: bool) -> None:
        """Makes the calls whose places are all taken, or, unless what is left `waits`, those with free ones too."""
        for size, groups in self._chunks.take(waits=waits):
            self._programs.run(Prefill(*self._together(size, groups)))
        for size, groups in self._draft_chunks.take(waits=waits):
            self._programs.run(PrefillDraft(*self._together(size, groups)))

    def _together(self, size: int, groups: Iterable[list[tuple[Place, Chunk]]]) -> tuple[Place, Chunk]:
        """Chunks as one call has them, with chunks of no tokens in the places that are free."""
        none, zero = np.zeros(self._table_width, np.int32), np.int32(0)
        nothing = (Place(none, zero), Chunk(np.zeros(size, np.int32), zero, zero))
        in_group = self._places.in_group[size]
        all_of = [chunk for group in groups for chunk in [*group, *[nothing] * (in_group - len(group))]]
        if len(all_of) == 1:
            return all_of[0]
        places, chunks = zip(*all_of, strict=True)
        return Place(*map(np.stack, zip(*places, strict=True))), Chunk(*map(np.stack, zip(*chunks, strict=True)))

    def _chunk(self, request: EngineRequest, ids: list[int], span: Span) -> tuple[Place, Chunk]:
        tokens = np.zeros(span.size, np.int32)
        tokens[: span.num_tokens] = ids[span.start : span.start + span.num_tokens]
        place = Place(self._table(request.pages), np.int32(request.shard))
        return place, Chunk(tokens, np.int32(span.start), np.int32(span.num_tokens))

    def _group(self, request: EngineRequest) -> int:
        """Of `data`: that of its shard."""
        return request.shard * self._places.num_groups // len(self._scheduler.pools)

    def release_unreachable(self, request: EngineRequest) -> None:
        """Gives back a running request's pages that no layer reads any more."""
        self.clear(request, self._scheduler.release_unreachable(request))

    def set_aside(self, request: EngineRequest) -> None:
        """Takes a request's row and pages. The hosts keep a copy of a running one's: prefill may give other bits."""
        if request.is_running:
            self.release_unreachable(request)
            request.saved_as = next(self._numbers)
            saved = (np.int32(request.saved_as), self._written_pages(request), np.int32(request.shard))
            self._programs.run(SavePages(*saved))
        self.clear(request, self._scheduler.set_aside(request))

    def _bring_back(self, request: EngineRequest, saved_as: int) -> None:
        pages = self._written_pages(request)
        pages[: request.num_shared_pages] = 0  # others have filled them with the same bits
        self._programs.run(RestorePages(np.int32(saved_as), pages, np.int32(request.shard)))
        request.saved_as, request.num_prefilled = None, request.num_to_prefill

    def forget(self, request: EngineRequest) -> None:
        """Drops the copy of a request that has ended."""
        if request.saved_as is not None:
            self._programs.run(ForgetPages(np.int32(request.saved_as)))
            request.saved_as = None

    def clear(self, request: EngineRequest, pages: list[int]) -> None:
        """Clears pages that `request` has left and that may hold NaN, if the platform needs it."""
        if self._needs_clean_pages and pages:
            self._programs.run(ClearPages(self._table(pages), np.int32(len(pages)), np.int32(request.shard)))

    def activate(self, request: EngineRequest) -> None:
        """Puts a request whose keys and values are in its pages into its row, or again when its halt id has changed."""
        request.halt_id = None if request.constraint is None else request.constraint.halt_id
        new = row_state(
            self._config,
            request.params,
            prompt=request.prompt,
            generated=request.generated,
            remaining=request.budget - len(request.generated),
            seed=request.seed,
            halt_id=request.halt_id,
            history_size=self._history_size,
            prediction=request.prediction,
            draft_length=request.draft_length,
        )
        assert request.row is not None
        self._programs.run(Insert(np.int32(request.row), new))
        request.is_running = True

    def _written_pages(self, request: EngineRequest) -> Int[np.ndarray, " pages"]:
        end = self._scheduler.num_pages_for(request.num_to_prefill)
        return np.array(request.pages[request.num_released : end], np.int32)

    def _table(self, pages: list[int]) -> Int[np.ndarray, " max_pages"]:
        table = np.zeros(self._table_width, np.int32)
        table[: len(pages)] = pages
        return table
