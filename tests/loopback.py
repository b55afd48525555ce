"""The HTTP server of the stand-ins (`bucket.py`, `hub.py`): on loopback, a thread for each connection."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class StandIn:
    """What a stand-in knows, and tests read. `num_connections` are open now."""

    url: str = ""
    num_connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection, without a word on stderr; `server.standin` is what it answers for."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        """`length` is what the answer says, if it is not the body's."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
    standin: StandIn

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self.standin.lock:
            self.standin.num_connections += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.standin.lock:
                self.standin.num_connections -= 1


@contextlib.contextmanager
def running[S: StandIn](standin: S, handler: type[Handler]) -> Iterator[S]:
    """`standin` on a free port, for as long as the body runs."""
    server = _Server(("127.0.0.1", 0), handler)
    server.standin = standin
    standin.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield standin
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
