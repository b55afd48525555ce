"""Ranges of bytes over HTTP, straight into the caller's memory.

The standard library's client: it takes a quarter of httpx's CPU time a gigabyte (bench/LOG.md), which decides how fast
eight connections are on two cores.
"""

from __future__ import annotations

import http.client
import re
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit

from jaxllama.errors import StoreError
from jaxllama.weights.places.retries import ReadInterruptedError

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_MAX_REDIRECTS = 5
_WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})
_BROKEN = (http.client.HTTPException, OSError)


class RefusedError(Exception):
    """An answer of 401, 403, 404 or 410: what a signed address says when it has expired, too."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class HttpRanges:
    """Reads ranges, each thread over a connection of its own while it reads; connections are kept."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._etags: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self._tls = ssl.create_default_context()

    def read(
        self, where: str, url: str, headers: Mapping[str, str], offset: int, buffer: memoryview, size: int
    ) -> None:
        """Fills `buffer` with the bytes from `offset` of the `size` at `url`. `headers` never leave the first host.

        Raises: ReadInterruptedError with the bytes that arrived; RefusedError; StoreError when what is there is not
        what it was: other sizes, another ETag.
        """
        num_read = 0
        for _ in range(_MAX_REDIRECTS):
            connection = self._connect(url)
            keep = False
            try:
                answer = self._ask(connection, url, headers, offset, len(buffer))
                if 300 <= answer.status < 400 and answer.headers.get("Location"):
                    answer.read()
                    target = urljoin(url, answer.headers["Location"])
                    headers = headers if urlsplit(target).netloc == urlsplit(url).netloc else {}
                    url, keep = target, True
                    continue
                self._check(where, url, answer, offset, len(buffer), size)
                while num_read < len(buffer):
                    got = answer.readinto(buffer[num_read:])
                    if not got:
                        raise ReadInterruptedError(f"the answer ended at byte {offset + num_read}", num_read)
                    num_read += got
                # An answer of exactly this length has been read to its end, so the connection can be used again.
                answer.read(0)
                keep = answer.isclosed()
                return
            except _BROKEN as error:
                raise ReadInterruptedError(f"{type(error).__name__}: {error or 'connection lost'}", num_read) from None
            finally:
                self._give_back(url, connection, keep=keep)
        raise StoreError(f"{where}: more than {_MAX_REDIRECTS} redirects")

    def close(self) -> None:
        """Closes the connections that nobody reads from."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def _ask(
        self, connection: http.client.HTTPConnection, url: str, headers: Mapping[str, str], offset: int, length: int
    ) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        connection.request("GET", path, headers={**headers, **wanted})
        return connection.getresponse()

    def _check(
        self, where: str, url: str, answer: http.client.HTTPResponse, offset: int, length: int, size: int
    ) -> None:
        status = answer.status
        if status in _WORTH_ANOTHER_TRY:
            raise ReadInterruptedError(
                f"the store answered {status}", wait_s=_seconds(answer.headers.get("Retry-After"))
            )
        if status in (401, 403, 404, 410):
            raise RefusedError(status)
        if status not in (200, 206):
            raise StoreError(f"{where}: the store answered {status} to a range of bytes from {offset}")
        self._check_etag(where, url, answer.headers.get("ETag"))
        if status == 200:
            got = answer.headers.get("Content-Length")
            if offset or length != size or got not in (None, str(size)):
                raise StoreError(
                    f"{where}: the store answered with {got} bytes from the start, expected {length} of {size} "
                    f"from byte {offset}. Either it knows no ranges, or the file has changed"
                )
            return
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if found is None:
            raise ReadInterruptedError("the answer does not say which bytes it has")
        if found[3] not in ("*", str(size)):
            raise StoreError(f"{where}: has {found[3]} bytes now, expected {size}. Did it change meanwhile?")
        if (int(found[1]), int(found[2])) != (offset, offset + length - 1):
            raise ReadInterruptedError(
                f"the answer has bytes {found[1]} to {found[2]}, asked were {length} from {offset}"
            )

    def _check_etag(self, where: str, url: str, etag: str | None) -> None:
        if etag is None:
            return
        # Another host may have another ETag for the same bytes.
        with self._lock:
            first = self._etags.setdefault((where, urlsplit(url).netloc), etag)
        if etag != first:
            raise StoreError(f"{where}: has changed while it was read (ETag {first}, now {etag})")

    def _connect(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        with self._lock:
            idle = self._idle.get((parts.scheme, parts.netloc))
            if idle:
                return idle.pop()
        return _new_connection(parts.scheme, parts.netloc, self._tls)

    def _give_back(self, url: str, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        parts = urlsplit(url)
        if not keep:
            connection.close()
            return
        with self._lock:
            self._idle.setdefault((parts.scheme, parts.netloc), []).append(connection)


def _new_connection(scheme: str, netloc: str, tls: ssl.SSLContext) -> http.client.HTTPConnection:
    """To the host itself, or through the proxy that the environment names for it."""
    host = netloc.rpartition("@")[2]
    proxy = urllib.request.getproxies().get(scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        via = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        if scheme == "https":
            connection = http.client.HTTPSConnection(via.hostname or "", via.port, timeout=_READ_TIMEOUT_S, context=tls)
            connection.set_tunnel(host)
            return connection
        raise StoreError(f"http://{host}: a proxy for plain HTTP is not supported; use https, or name it in NO_PROXY")
    if scheme == "https":
        return http.client.HTTPSConnection(host, timeout=_READ_TIMEOUT_S, context=tls)
    return http.client.HTTPConnection(host, timeout=_READ_TIMEOUT_S)


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is left to our own waits."""
    return float(value) if value and value.isdigit() else None
