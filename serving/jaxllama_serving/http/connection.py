"""The connection below the routes: what aiohttp's parser rejects, slow heads, and the cap on connections."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from typing import Any, cast

from aiohttp import web

from jaxllama_serving.config import ServerConfig, ServerConfigError
from jaxllama_serving.http.framing import FramingMeter
from jaxllama_serving.protocol.errors import ApiError, from_http_status, invalid, unavailable

logger = logging.getLogger("jaxllama.serving")

BACKLOG = 1024
SECURITY_HEADERS = {
    "Server": "jaxllama",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def error_response(error: ApiError, request_id: str) -> web.Response:
    """Returns the envelope of `error` as a response."""
    response = web.json_response(error.envelope(), status=error.status, headers={**SECURITY_HEADERS, **error.headers})
    response.headers["X-Request-Id"] = request_id
    if error.headers.get("Connection") == "close":
        response.force_close()
    return response


class Connection(web.RequestHandler):
    """aiohttp's protocol with our envelope on every error, a deadline for each request's head, and a cap.

    A head (request line and headers) has `header_timeout_s` from its first byte; an idle connection has
    `idle_timeout_s`. Past `max_connections` a connection gets a 503 at once.
    """

    def __init__(self, server: web.Server, config: ServerConfig, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._server = server
        self._config = config
        self._head_deadline: asyncio.TimerHandle | None = None
        self.framing = FramingMeter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self._server.connections) >= self._config.max_connections:
            refused = cast(asyncio.Transport, transport)
            refused.write(_raw(unavailable("Too many connections are open.")))
            refused.close()
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        self.framing.before()
        super().data_received(data)
        num_new = self._request_count - before
        self.framing.after(len(data), list(self._messages)[len(self._messages) - num_new :])
        if num_new:
            self._stop_deadline()
        elif self._head_deadline is None and self._waiter is not None and data:
            # Idle (aiohttp sleeps on a waiter between requests), and no head is complete: these bytes begin one.
            self._head_deadline = self._loop.call_later(self._config.header_timeout_s, self._head_too_slow)

    def _stop_deadline(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _head_too_slow(self) -> None:
        self._head_deadline = None
        if self.transport is not None:
            message = f"The request's head took longer than {self._config.header_timeout_s:g} s."
            self.transport.write(_raw(ApiError(408, message, "timeout")))
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what the parser rejected. Its own message may quote the client's bytes, so it is not passed on."""
        request_id = new_request_id()
        reason = type(exc).__name__ if exc is not None else str(status)
        logger.info("%s rejected by the HTTP parser: %s", request_id, reason, extra={"request_id": request_id})
        if request.writer.output_size > 0:
            raise ConnectionError("a response has already begun")
        error = (
            invalid(f"The request is not valid HTTP, or its head is too large ({reason}).", code="bad_http_request")
            if status < 500
            else ApiError(500, f"The server failed on this request. Quote the id {request_id}.", "server_error")
        )
        response = error_response(error, request_id)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Turns what aiohttp raises outside the middlewares (a bad Expect header) into the envelope."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = error_response(from_http_status(resp.status, resp.headers), new_request_id())
        return await super().finish_response(request, resp, start_time)


def new_request_id() -> str:
    """Returns an id for a request whose client gave none."""
    return f"req_{secrets.token_hex(12)}"


def _raw(error: ApiError) -> bytes:
    body = json.dumps(error.envelope()).encode()
    reason = {408: "Request Timeout", 503: "Service Unavailable"}[error.status]
    head = [f"HTTP/1.1 {error.status} {reason}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    head += [f"{name}: {value}" for name, value in error.headers.items()]
    head += [f"X-Request-Id: {new_request_id()}", "Connection: close", "", ""]
    return "\r\n".join(head).encode("latin-1") + body


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the address; port 0 takes a free one.

    Raises: ServerConfigError if the address is in use or does not exist.
    """
    sock: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Listening at once: two sockets may be bound to one address, but only one of them can listen.
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ServerConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --host or --port."
        ) from None
    return sock


class Listener:
    """One application listening on one socket."""

    def __init__(self, app: web.Application, config: ServerConfig) -> None:
        self._config = config
        # Without handler cancellation aiohttp lets a handler run on for a client that has gone.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        self._server: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Begins to accept connections on `sock`, which is closed with the listener."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(
                server,
                self._config,
                loop=loop,
                access_log=None,
                keepalive_timeout=self._config.idle_timeout_s,
                lingering_time=2.0,
                auto_decompress=False,
            )

        self._server = await loop.create_server(connection, sock=sock, backlog=BACKLOG)

    async def close(self) -> None:
        """Stops accepting, cancels what still runs and closes every connection."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
