"""A store of buckets on loopback that speaks as much of S3's and GCS's XML as models take, and errs when told.

GET /BUCKET?list-type=2&prefix=…    GET, HEAD, PUT and DELETE /BUCKET/KEY, with Range, If-Match and conditions of puts
POST /BUCKET?delete                 many at once
POST and PUT /BUCKET/KEY?uploads    an upload in parts
"""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import loopback

PAGE = 50


@dataclass
class Store(loopback.StandIn):
    """`objects` by `BUCKET/KEY`. `faults` are what the next answers to reads do wrong, one each; `write_faults` and
    `list_faults` those to writes and listings."""

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    write_faults: list[str] = field(default_factory=list)
    list_faults: list[str] = field(default_factory=list)
    generations: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, where: str, folder: Path) -> None:
        """Objects of all files of `folder`, below `BUCKET/PATH`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"{where}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


class _Handler(loopback.Handler):
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    def do_GET(self) -> None:
        store: Store = self.server.standin
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
        headers = {
            "ETag": '"another"' if fault == "etag" else etag,
            "Last-Modified": "Sat, 28 Nov 2026 12:00:00 GMT",
            "x-goog-generation": str(store.generations.get(self._key(), 1)),
        }
        status, body = 200, data
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2]) + 1
            if fault == "repeated":
                start, stop = max(0, start - 1), stop - 1
            status, body = 206, data[start:stop]
            if fault == "short":
                body = body[:-1]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        sent = body[: len(body) // 2] if fault == "dropped" else body
        self._answer(status, sent, headers, len(body))
        self.close_connection = self.close_connection or fault == "dropped"
        return None

    def do_PUT(self) -> None:
        store: Store = self.server.standin
        key, query = self._key(), parse_qs(urlsplit(self.path).query)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        store.requests.append(f"PUT {key} {len(data)}")
        with store.lock:
            if "uploadId" in query:
                store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = data
                return self._answer(200, headers={"ETag": _etag(data)})
            fault = store.write_faults.pop(0) if store.write_faults else ""
            if fault.isdigit():
                return self._answer(int(fault))
            if not self._may_put(store, key):
                return self._answer(412)
            if fault != "dropped":
                self._store(store, key, data[: len(data) // 2] if fault == "short" else data)
        if fault in ("dropped", "lost"):
            self.close_connection = True
            return None
        etag = '"another"' if fault == "etag" else _etag(store.objects[key])
        return self._answer(200, headers={"ETag": etag, "x-goog-generation": str(store.generations[key])})

    def do_POST(self) -> None:
        store: Store = self.server.standin
        key, query = self._key(), parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        store.requests.append(f"POST {self.path}")
        if "delete" in query:
            names = [unescape(name) for name in re.findall(r"<Key>(.*?)</Key>", body)]
            for name in names:
                store.objects.pop(f"{key}/{name}", None)
            deleted = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            return self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        if "uploads" in query:
            upload = f"upload{len(store.uploads)}"
            store.uploads[upload] = {}
            text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            return self._answer(200, text.encode())
        with store.lock:
            parts = store.uploads.pop(query["uploadId"][0])
            self._store(store, key, b"".join(parts[number] for number in sorted(parts)))
        etag = escape(_etag(store.objects[key]))
        text = f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        return self._answer(200, text.encode())

    def do_DELETE(self) -> None:
        store: Store = self.server.standin
        store.requests.append(f"DELETE {self._key()}")
        store.uploads.pop(parse_qs(urlsplit(self.path).query).get("uploadId", [""])[0], None)
        with store.lock:
            found = store.objects.pop(self._key(), None)
        return self._answer(204 if found is not None else 404)

    def _may_put(self, store: Store, key: str) -> bool:
        found = store.objects.get(key)
        if self.headers.get("If-None-Match") == "*" or self.headers.get("x-goog-if-generation-match") == "0":
            return found is None
        if etag := self.headers.get("If-Match"):
            return found is not None and etag == _etag(found)
        if generation := self.headers.get("x-goog-if-generation-match"):
            return found is not None and int(generation) == store.generations[key]
        return True

    def _store(self, store: Store, key: str, data: bytes) -> None:
        store.objects[key] = data
        store.generations[key] = store.generations.get(key, 0) + 1

    def _list(self, store: Store, query: dict[str, list[str]]) -> None:
        fault = store.list_faults.pop(0) if store.list_faults else ""
        if fault.isdigit():
            return self._answer(int(fault))
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
        sent = text.encode()[: len(text) // 2] if fault == "short" else text.encode()
        return self._answer(200, sent)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def running() -> AbstractContextManager[Store]:
    """A store on a free port, for as long as the body runs."""
    return loopback.running(Store(), _Handler)
