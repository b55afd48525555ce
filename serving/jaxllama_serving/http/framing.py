"""Bounds on what frames a chunked body: sizes, extensions and trailers, which the parser reads and forgets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from aiohttp.streams import StreamReader

from jaxllama_serving.protocol.errors import ApiError, invalid

MAX_FRAMING_BYTES = 4096
"""Of one request, beyond `CHUNK_BYTES` for each chunk. Honest chunks have a size and two line ends."""
CHUNK_BYTES = 16


def check_transfer_encoding(request: web.BaseRequest) -> None:
    """Raises: ApiError, status 400, for any coding but chunked, and for that one where HTTP does not have it."""
    codings = request.headers.getall("Transfer-Encoding", ())
    if codings and (len(codings) > 1 or codings[0].strip().lower() != "chunked" or request.version < (1, 1)):
        error = invalid(
            "Transfer-Encoding may only be chunked, and only in HTTP/1.1: compressed bodies are not accepted.",
            code="bad_http_request",
        )
        error.headers = {"Connection": "close"}
        raise error


class FramingMeter:
    """Counts the bytes of one connection that belong neither to a head nor to a body."""

    def __init__(self) -> None:
        self._body: StreamReader | None = None
        self._body_bytes = self._num_chunks = 0
        self._num_left = MAX_FRAMING_BYTES
        self._excessive: StreamReader | None = None
        self._watched: tuple[StreamReader, asyncio.Timeout] | None = None

    def before(self) -> None:
        """Notes where the body stands, before the parser gets more."""
        if self._body is not None:
            self._body_bytes, self._num_chunks = self._body.total_bytes, _num_chunks(self._body)

    def after(self, num_bytes: int, messages: Sequence[tuple[Any, Any]]) -> None:
        """Counts `num_bytes` that the parser has got, from which it made `messages` (head, body)."""
        if self._body is not None:
            num_bytes -= self._body.total_bytes - self._body_bytes
            self._num_left += CHUNK_BYTES * max(0, _num_chunks(self._body) - self._num_chunks)
        for head, body in messages:
            # What lies between two messages of one read is charged to the later.
            self._num_left = MAX_FRAMING_BYTES
            self._body = body if isinstance(body, StreamReader) else None
            if self._body is not None:
                num_bytes -= self._body.total_bytes
                self._num_left += CHUNK_BYTES * _num_chunks(self._body)
            num_bytes -= _num_head_bytes(head)
        # Negative where a head began in an earlier read, which must not pay for framing.
        self._num_left -= max(0, num_bytes)
        if self._num_left < 0 and self._body is not None:
            self._excessive = self._body
            if self._watched is not None and self._watched[0] is self._body:
                self._watched[1].reschedule(asyncio.get_running_loop().time())
                self._watched = None

    @contextmanager
    def watching(self, body: StreamReader, deadline: asyncio.Timeout) -> Iterator[None]:
        """Lets `deadline` pass as soon as `body` has too much framing: its reader may wait for bytes in vain."""
        self._watched = (body, deadline)
        try:
            yield
        finally:
            self._watched = None

    def check(self, body: StreamReader) -> None:
        """Raises: ApiError, status 413, if `body` has too much framing."""
        if self._excessive is body:
            raise ApiError(
                413,
                f"The chunks of the body are framed by more than {MAX_FRAMING_BYTES} bytes of sizes, extensions and "
                "trailers.",
                code="body_too_large",
                headers={"Connection": "close"},
            )


def _num_chunks(body: StreamReader) -> int:
    # Private to aiohttp, but without it a chunk could not be told from its extensions.
    return len(getattr(body, "_http_chunk_splits", None) or ())


def _num_head_bytes(head: Any) -> int:
    raw_headers = getattr(head, "raw_headers", ())
    line = len(getattr(head, "method", "")) + len(getattr(head, "path", "")) + len("  HTTP/1.1\r\n\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in raw_headers)
