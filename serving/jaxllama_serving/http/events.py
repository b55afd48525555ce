"""Server-sent events to one client, and the queue that carries an engine's outputs to the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from jaxllama_serving.protocol.errors import ApiError

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    # Proxies of the nginx kind would otherwise collect the stream before passing it on.
    "X-Accel-Buffering": "no",
}


def to_json(value: Any) -> bytes:
    """Returns compact UTF-8 JSON. Raises: ValueError for NaN or an infinity, which JSON cannot hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class EventStream:
    """One response of server-sent events; its status line goes out with the first event.

    A reader that takes nothing for `write_timeout_s` is cut off: `send` then raises ConnectionResetError.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str], write_timeout_s: float) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**STREAM_HEADERS, **headers})
        self._write_timeout_s = write_timeout_s

    @property
    def started(self) -> bool:
        """Whether the status has been sent, so that an error can only be an event."""
        return self._response.prepared

    async def send(self, *payloads: Any) -> None:
        """Sends each payload as one event, all in one write."""
        await self._write(b"".join(b"data: " + to_json(payload) + b"\n\n" for payload in payloads))

    async def keep_alive(self) -> None:
        """Sends a comment, which keeps proxies and clients from giving up on a silent stream."""
        await self._write(b": keep-alive\n\n")

    async def fail(self, error: ApiError) -> web.StreamResponse:
        """Sends the error as the last event, without the `[DONE]` that would claim success."""
        await self.send(error.envelope())
        await self._response.write_eof()
        return self._response

    async def done(self) -> web.StreamResponse:
        """Ends the stream."""
        await self._write(b"data: [DONE]\n\n")
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                if not self._response.prepared:
                    await self._response.prepare(self._request)
                await self._response.write(data)
        except TimeoutError:
            abort(self._request)
            raise ConnectionResetError("the reader stalled") from None


def abort(request: web.Request) -> None:
    """Closes the connection at once and discards what it still had to send."""
    transport = request.transport
    if transport is not None:
        transport.abort()


class OutputQueue[Item]:
    """Items from other threads, in order, for one consumer on `loop`.

    `weigh` gives an item's size in tokens. When more than `max_tokens` wait, `on_overflow` runs once and the queue
    takes no more: the consumer has stalled and memory must not pay for it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        weigh: Callable[[Item], int],
        max_tokens: int | None,
        on_overflow: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._weigh = weigh
        self._max_tokens = max_tokens
        self._on_overflow = on_overflow
        self._items: list[Item] = []
        self._num_tokens = 0
        self._ready = asyncio.Event()
        self._overflowed = False

    def put_threadsafe(self, item: Item) -> None:
        """Adds an item from any thread and returns at once; does nothing when the loop has closed."""
        try:
            self._loop.call_soon_threadsafe(self.put, item)
        except RuntimeError:
            return

    def put(self, item: Item) -> None:
        """Adds an item; on the loop's own thread only."""
        if self._overflowed:
            return
        self._items.append(item)
        self._num_tokens += self._weigh(item)
        self._ready.set()
        if self._max_tokens is not None and self._num_tokens > self._max_tokens:
            self._overflowed = True
            self._items.clear()
            self._on_overflow()

    async def get_all(self, timeout_s: float) -> list[Item]:
        """Waits for at least one item and returns all; an empty list when `timeout_s` passes first."""
        if not self._items:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._ready.wait()
            except TimeoutError:
                return []
        items, self._items = self._items, []
        self._num_tokens = 0
        self._ready.clear()
        return items
