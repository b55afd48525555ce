"""The requests at work: how many, with how many tokens, and how they end when the server does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from jaxllama.errors import QueueFullError
from jaxllama_serving.http.context import RequestContext
from jaxllama_serving.metrics import Metrics
from jaxllama_serving.protocol.errors import unavailable
from jaxllama_serving.requests.choices import Choices

_ABORT_GRACE_S = 1.0


class RunningRequests:
    """Counts requests from their first byte to their last. Used on the event loop's thread only.

    `num` are running; of those that have rows or wait for some, the prompts have `num_pending_tokens` in all, at most
    `max_pending_tokens` unless it is one alone.
    """

    def __init__(self, max_pending_tokens: int, metrics: Metrics) -> None:
        self.num = 0
        self.num_pending_tokens = 0
        self._max_pending_tokens = max_pending_tokens
        self._metrics = metrics
        self._held: set[Choices] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request, so that draining waits for it."""
        self.num += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num -= 1
            if self.num == 0:
                self._idle.set()

    @contextmanager
    def holding(self, choices: Choices, context: RequestContext) -> Iterator[Choices]:
        """Holds a choices's rows, and keeps it where the end of draining finds it. Counts it at its end.

        Raises: QueueFullError.
        """
        num_tokens = sum(len(choice.prompt_ids) for choice in choices.all)
        if self.num_pending_tokens and self.num_pending_tokens + num_tokens > self._max_pending_tokens:
            raise QueueFullError(f"{self.num_pending_tokens} prompt tokens are pending already")
        with choices:
            self._held.add(choices)
            self.num_pending_tokens += num_tokens
            try:
                yield choices
            finally:
                self.num_pending_tokens -= num_tokens
                self._held.discard(choices)
                self._metrics.count_choices(context.num_prompt_tokens, choices, context.started)

    async def drain(self, timeout_s: float) -> int:
        """Waits until all have ended; returns how many had to be ended at the deadline."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            ended = self.num
            for choices in tuple(self._held):
                choices.abort(unavailable("The server shut down before this request finished."))
            await asyncio.wait([asyncio.ensure_future(self._idle.wait())], timeout=_ABORT_GRACE_S)
            return ended
        return 0
