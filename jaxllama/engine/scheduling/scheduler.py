"""Who runs when: the host's decisions, without JAX.

A request waits, is admitted to a row (it holds the pages of its prompt that others have filled, and takes the rest),
is prefilled chunk by chunk, and runs. Pages for its output are taken as it grows. When none are left, the youngest
request is set aside: it gives its pages back and waits again in its place in the order. On a mesh all this goes for
each shard of rows and pages by itself (`ShardedAttention`), and an admitted request belongs to one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxllama.engine.scheduling.chunks import ChunkPlan, Span
from jaxllama.engine.scheduling.pages import PagePool
from jaxllama.engine.scheduling.request import EngineRequest


class PageCopy(NamedTuple):
    """A page whose beginning another one, just taken, is to have too, before anything else is launched."""

    source: int
    target: int


class Scheduler:
    """Rows, pages and the queue. Not thread-safe: the engine's thread alone uses it."""

    def __init__(
        self,
        *,
        num_rows: int,
        num_pages: int,
        plan: ChunkPlan,
        max_steps: int,
        num_shards: int = 1,
        window: int | None = None,
        reach: int | None = None,
        read_tokens: int = 128,
    ) -> None:
        """`num_rows` in all, `num_pages` on each shard; a dispatch runs at most `max_steps` steps.

        No layer sees further back than `window` tokens, itself included, and logits depend on the last `reach` tokens
        before their own alone (None: some layer sees all). Attention reads keys in blocks of `read_tokens`: of one that
        is seen in part, all pages are held.
        """
        self.rows: list[EngineRequest | None] = [None] * num_rows
        self.waiting: list[EngineRequest] = []
        self.pools = [PagePool(num_pages) for _ in range(num_shards)]
        self._rows_per_shard = num_rows // num_shards
        self.num_queried_tokens = self.num_hit_tokens = 0
        self._plan = plan
        self._page_size = plan.page_size
        self._max_steps = max_steps
        self._window, self._reach, self._read_tokens = window, reach, read_tokens
        self._copies: list[PageCopy] = []

    @property
    def running(self) -> list[EngineRequest]:
        """Requests that decode, by row."""
        return [request for request in self.rows if request is not None and request.is_running]

    @property
    def prefilling(self) -> list[EngineRequest]:
        """Admitted requests whose prompt is not in the cache yet, first come first."""
        left = (r for r in self.rows if r is not None and not r.is_running and not r.is_launched)
        return sorted(left, key=lambda r: r.order)

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting) or any(request is not None for request in self.rows)

    @property
    def copies_pages(self) -> bool:
        """Whether `admit` may have something to copy."""
        return self._plan.skips_padding

    def enqueue(self, request: EngineRequest) -> None:
        """Puts a request in line: by priority, then by arrival."""
        if request.scoring is not None:
            before = request.prompt[: request.part_end]
            request.part_key = self._plan.part_key(request.scope, request.page_keys, before)
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.order)

    def admit(self) -> list[PageCopy]:
        """Gives rows, and pages for their prompts, to waiting requests in order, while there are any.

        Returns what is to be copied, in this order.
        """
        while self.waiting and self._place(self.waiting[0]):
            request = self.waiting.pop(0)
            if request.queued_s is None:
                request.queued_s = time.monotonic() - request.made_at
            if request.num_cached_tokens is None:
                request.num_cached_tokens = request.num_prefilled
                self.num_queried_tokens += len(request.prompt)
                self.num_hit_tokens += request.num_prefilled
        copies, self._copies = self._copies, []
        return copies

    def _place(self, request: EngineRequest) -> bool:
        """Gives a request a row and pages on the shard that has most of its prompt, or else most pages to spare."""
        rows: dict[int, int] = {}
        for row, holder in enumerate(self.rows):
            if holder is None:
                rows.setdefault(row // self._rows_per_shard, row)
        found = {shard: self.pools[shard].find(request.findable_keys(self._page_size)) for shard in rows}
        if not request.is_saved:
            if any(self._is_being_prefilled(request, shard, len(pages)) for shard, pages in found.items()):
                return False
            for pages in found.values():
                usable = self._plan.usable(len(pages) * self._page_size, request.num_to_prefill)
                del pages[usable // self._page_size :]
        num_pages = self.num_pages_for(request.num_to_prefill + self._room(request))
        gap = self._num_unreachable(request) if request.is_saved else 0
        if gap:
            # What it shared lies before the window, or is in its copy.
            found = {shard: [] for shard in rows}
        for shard in sorted(rows, key=lambda shard: (-len(found[shard]), -self.pools[shard].num_free)):
            pool, pages = self.pools[shard], found[shard]
            part = self._part_after(request, shard, len(pages))
            pool.share(pages)
            taken = pool.take(num_pages - gap - len(pages))
            if taken is None:
                pool.give_back(pages)
                continue
            request.shard, request.row, request.pages = shard, rows[shard], [0] * gap + pages + taken
            request.num_released = gap
            request.num_shared_pages, request.num_prefilled = len(pages), len(pages) * self._page_size
            request.draft_length = pool.num_with_draft(pages) * self._page_size
            if part is not None:
                self._copies.append(PageCopy(part, taken[0]))
                request.num_prefilled = request.part_end
            self.rows[request.row] = request
            return True
        return False

    def _room(self, request: EngineRequest) -> int:
        """How many tokens to come must have pages on admission.

        A whole dispatch's for a request that was set aside, so that it is not set aside again at once.
        """
        if request.scoring is not None:
            return 0
        return min(self._max_steps, request.budget - len(request.generated)) if request.is_saved else 1

    def _is_being_prefilled(self, request: EngineRequest, shard: int, num_found: int) -> bool:
        """Whether a row of `shard` will soon have filled the next page that `request` needs.

        Waiting for it costs nothing, as rows are prefilled one after another.
        """
        key = request.findable_keys(self._page_size)[num_found : num_found + 1]
        part = b"" if key or self._part_after(request, shard, num_found) is not None else request.part_key
        return any(
            (key and other.page_keys[num_found : num_found + 1] == key)
            or (part and other.part_key == part and other.num_prefilled < other.part_end)
            for other in self.prefilling
            if other.shard == shard and not other.is_saved and other.num_prefilled <= num_found * self._page_size
        )

    def _part_after(self, request: EngineRequest, shard: int, num_found: int) -> int | None:
        """The page that begins as the next one of `request` does, after all full ones that it may find."""
        if not request.part_key or num_found < len(request.findable_keys(self._page_size)):
            return None
        return self.pools[shard].find_part(request.part_key)

    def spans(self, request: EngineRequest) -> Iterator[Span]:
        """What a request's prefill still needs: a function of its own length, unless programs agree."""
        return self._plan.spans(request.num_prefilled, request.num_to_prefill, self.max_prefill_tokens)

    def cost(self, span: Span) -> int:
        """What of `max_prefill_tokens` it takes."""
        return self._plan.cost(span)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Tokens of the programs that prefill."""
        return self._plan.sizes

    @property
    def max_prefill_tokens(self) -> int:
        """How many tokens to prefill at once, while those who run wait."""
        return self._plan.longest(has_streams=bool(self.running))

    def advance(self, request: EngineRequest, span: Span) -> None:
        """Notes that `span` is on its way to the device: from now on other requests find the pages it fills."""
        request.num_prefilled += span.num_tokens
        full = slice(span.start // self._page_size, request.num_prefilled // self._page_size)
        self.pools[request.shard].publish(request.pages[full], request.page_keys[full])
        if request.part_key and request.num_prefilled >= request.part_end:
            page = request.pages[request.part_end // self._page_size]
            self.pools[request.shard].name_part(page, request.part_key)

    def advance_draft(self, request: EngineRequest) -> list[Span]:
        """What a draft model must prefill to come as far as the request's prefill has, which is on its way from now."""
        spans = list(self._plan.draft_spans(request.draft_length, request.num_prefilled))
        request.draft_length = request.num_prefilled
        self.pools[request.shard].fill_draft(request.pages[: request.draft_length // self._page_size])
        return spans

    def grow(self, request: EngineRequest, num_tokens: int) -> bool:
        """Makes sure that `request` has pages for `num_tokens` in all. False if its shard's are exhausted."""
        missing = self.num_pages_for(num_tokens) - len(request.pages)
        if missing <= 0:
            return True
        pages = self.pools[request.shard].take(missing)
        if pages is None:
            return False
        request.pages += pages
        return True

    def release_unreachable(self, request: EngineRequest) -> list[int]:
        """Gives back a running request's pages that no layer reads any more; others still find them by what they hold.

        What was launched before reads them before anything that is launched later writes to them. Returns the pages to
        clear, as `PagePool.give_back`.
        """
        first, end = request.num_released, self._num_unreachable(request)
        if end <= first:
            return []
        pool, pages = self.pools[request.shard], request.pages[first:end]
        self._prove(request, request.pages[:end])
        self._publish(request, request.pages[:end])
        request.pages[first:end] = [0] * len(pages)
        request.num_released = end
        return pool.give_back(pages)

    def _num_unreachable(self, request: EngineRequest) -> int:
        """Pages at the start of a request's that lie before the window of its next token, in whole blocks of reading.

        None before its first token has come: until then nothing tells that what it wrote is finite.
        """
        if self._window is None or not request.generated:
            return 0
        num_tokens = len(request.prompt) + len(request.generated) - self._window
        return max(num_tokens, 0) // self._read_tokens * self._read_tokens // self._page_size

    def youngest(self, shard: int) -> EngineRequest:
        """The request to set aside when a shard's pages run out: of those with a row there, the last in order."""
        first = shard * self._rows_per_shard
        own_rows = self.rows[first : first + self._rows_per_shard]
        return max((request for request in own_rows if request is not None), key=lambda r: r.order)

    def set_aside(self, request: EngineRequest) -> list[int]:
        """Takes a request's row and pages; it waits again in its old place in the order.

        Returns the pages to clear, as `PagePool.give_back`.
        """
        unclean = self._release(request)
        request.is_running = False
        self.enqueue(request)
        return unclean

    def remove(self, request: EngineRequest, *, has_failed: bool = False) -> list[int]:
        """Forgets a request that has ended, wherever it is. Returns the pages to clear, as `PagePool.give_back`.

        `has_failed`: what it wrote may not be finite.
        """
        unclean = []
        if request.row is not None:
            unclean = self._release(request, has_failed=has_failed)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.is_running = False
        request.is_finished = True
        return unclean

    def _release(self, request: EngineRequest, *, has_failed: bool = False) -> list[int]:
        assert request.row is not None
        self.rows[request.row] = None
        pool, held = self.pools[request.shard], request.pages[request.num_released :]
        if has_failed:
            pool.distrust(held)
        elif (request.is_running and request.generated) or request.has_all_scores:
            # A dispatch that still runs writes to later pages only.
            full = request.pages[: request.num_to_prefill // self._page_size]
            self._prove(request, full)
            pool.fill_draft(full[: request.draft_length // self._page_size])
            self._publish(request, full)
        unclean = pool.give_back(held)
        request.row, request.pages, request.num_released = None, [], 0
        return unclean

    def _prove(self, request: EngineRequest, full: list[int]) -> None:
        """Marks those of a request's first pages as finite on which its scores depended, that were finite themselves.

        Of what lies before the reach of the first scores nothing is known.
        """
        first = len(request.prompt) - 1 if request.scoring is None else request.scoring.first - 1
        known = 0 if self._reach is None else self.num_pages_for(max(first - self._reach, 0))
        self.pools[request.shard].prove(full[max(known, request.num_released) :])

    def _publish(self, request: EngineRequest, full: list[int]) -> None:
        """Lets others find a request's full pages; those of generated tokens only if prefill gives the same bits."""
        keys = request.page_keys[: len(full)]
        if self._plan.programs_agree and request.params.steering is None:
            ids = (request.prompt + request.generated)[len(keys) * self._page_size : request.num_to_prefill]
            keys = keys + self._plan.more_keys(keys[-1] if keys else self._plan.root(request.scope), ids)
        held = slice(request.num_released, min(len(keys), len(full)))
        self.pools[request.shard].publish(full[held], keys[held])

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self._page_size)
