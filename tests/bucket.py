"""A store of buckets on loopback that speaks as much of S3's and GCS's XML as reading models takes, and errs when told.

GET /BUCKET?list-type=2&prefix=…    GET, HEAD and PUT /BUCKET/KEY, with Range, If-Match and conditions of puts
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 50


@dataclass
class Store:
    """`objects` by `BUCKET/KEY`. `faults` are what the next answers to reads do wrong, one each."""

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, where: str, folder: Path) -> None:
        """Objects of all files of `folder`, below `BUCKET/PATH`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"{where}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        store: Store = self.server.store
        query = parse_qs(urlsplit(self.path).query)
        store.requests.append(f"{self.command} {self._key()} {self.headers.get('Range', '')}")
        if "list-type" in query:
            return self._list(store, query)
        data = store.objects.get(self._key())
        with store.lock:
            fault = store.faults.pop(0) if store.faults and data is not None else ""
        if data is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if fault.isdigit():
            return self._answer(int(fault))
        etag = _etag(data)
        if self.headers.get("If-Match", etag) != etag or fault == "changed":
            return self._answer(412)
        headers = {"ETag": etag, "Last-Modified": "Sat, 28 Nov 2026 12:00:00 GMT", "x-goog-generation": "1"}
        status, body = 200, data
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            status, body = 206, data[int(match[1]) : int(match[2]) + 1]
            headers["Content-Range"] = f"bytes {match[1]}-{int(match[1]) + len(body) - 1}/{len(data)}"
        sent = body[: len(body) // 2] if fault == "dropped" else body
        self._answer(status, sent, headers, len(body))
        self.close_connection = self.close_connection or fault == "dropped"
        return None

    def do_PUT(self) -> None:
        store: Store = self.server.store
        data = self.rfile.read(int(self.headers["Content-Length"]))
        only_new = self.headers.get("If-None-Match") == "*" or self.headers.get("x-goog-if-generation-match") == "0"
        with store.lock:
            if only_new and self._key() in store.objects:
                return self._answer(412)
            store.objects[self._key()] = data
        return self._answer(200, headers={"ETag": _etag(data), "x-goog-generation": "1"})

    def _list(self, store: Store, query: dict[str, list[str]]) -> None:
        bucket, prefix = self._key().split("/")[0], query.get("prefix", [""])[0]
        keys = sorted(key.removeprefix(f"{bucket}/") for key in store.objects if key.startswith(f"{bucket}/{prefix}"))
        start = int(query.get("continuation-token", ["0"])[0])
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(store.objects[f'{bucket}/{key}'])}</Size>"
            f"<LastModified>2026-11-28T12:00:00.000Z</LastModified>"
            f"<ETag>{escape(_etag(store.objects[f'{bucket}/{key}']))}</ETag></Contents>"
            for key in keys[start : start + PAGE]
        )
        more = start + PAGE < len(keys)
        token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        text = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>"
        self._answer(200, text.encode())

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


@contextlib.contextmanager
def running() -> Iterator[Store]:
    """A store on a free port, for as long as the body runs."""
    store = Store()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.store = store  # type: ignore[attr-defined]
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
