"""A folder of a bucket, `gs://bucket/path` or `s3://bucket/path`, or one GGUF file there.

Through obstore: its requests run outside Python, which leaves the two cores to the rest; it has conditional puts for
both stores and takes credentials as their own tools do (bench/LOG.md compares).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jaxllama.errors import MissingExtraError, PlaceError, StoreError
from jaxllama.weights.places.place import Place, PlaceFile
from jaxllama.weights.places.retries import ReadInterruptedError, attempt, fill

SCHEMES = ("gs", "s3")
_CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login",
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
}
# The bytes that a lost connection costs again at most.
_CHUNK_BYTES = 2**20
_CLIENT = {"allow_http": True, "connect_timeout": "10s", "timeout": "120s"}
MAX_PART_BYTES = 16 * 2**20
_MAX_WRITES = 3
# Our own retries read on where the connection was lost; the library's would begin again.
_NO_RETRY = {"max_retries": 0}

type Bytes = bytes | bytearray | memoryview


class _ConditionError(Exception):
    """A conditional put found another version than it was to replace."""


def open_bucket(url: str) -> BucketPlace:
    """Opens `gs://bucket/path` or `s3://bucket/path`. Asks the store nothing yet.

    Raises: PlaceError for an address that is none; MissingExtraError.
    """
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if parts.scheme not in SCHEMES or not parts.netloc or parts.query or parts.fragment:
        raise PlaceError(f"{url}: expected {' or '.join(f'{scheme}://bucket/path' for scheme in SCHEMES)}")
    try:
        import obstore.store
    except ModuleNotFoundError:
        raise MissingExtraError({"gs": "gcs", "s3": "s3"}[parts.scheme], "obstore") from None
    folder, _, last = path.rpartition("/")
    is_file = last.endswith(".gguf")
    prefix = folder if is_file else path
    root = f"{parts.scheme}://{parts.netloc}"
    try:
        kind: Any = {"gs": obstore.store.GCSStore, "s3": obstore.store.S3Store}[parts.scheme]
        how = {"prefix": prefix or None, "client_options": _CLIENT}
        store = kind(parts.netloc, retry_config=_NO_RETRY, **how)
    except obstore.exceptions.BaseError as error:
        raise PlaceError(f"{url}: cannot be opened ({_first_line(error)}). {_log_in(parts.scheme)}") from None
    where = f"{root}/{prefix}".rstrip("/")
    return BucketPlace(
        store,
        lambda: kind(parts.netloc, **how),
        parts.scheme,
        where,
        last if is_file else None,
        name=last or parts.netloc,
    )


@dataclass(frozen=True)
class ObjectVersion:
    """An object as one put left it; what a conditional put replaces. GCS tells them apart by `version`."""

    etag: str | None
    version: str | None


class BucketPlace(Place):
    """A folder of a bucket. It is listed once, when it is first asked for a file."""

    num_readers = 16

    def __init__(
        self, store: Any, with_retries: Callable[[], Any], scheme: str, where: str, file: str | None, name: str
    ) -> None:
        self._store = store
        # A part of an upload can be sent again by nobody but the library.
        self._with_retries = with_retries
        self._scheme = scheme
        self.where = where
        self.file = file
        self.name = name
        self._files: dict[str, PlaceFile] | None = None
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return sorted(name for name in self._listed() if "/" not in name)

    def all_names(self) -> list[str]:
        return sorted(self._listed())

    def stat(self, name: str) -> PlaceFile | None:
        return self._listed().get(name)

    def read_into(self, file: PlaceFile, offset: int, buffer: memoryview) -> None:
        where = self / file.name
        if offset + len(buffer) > file.size:
            raise StoreError(f"{where}: ends at byte {file.size}, asked were {len(buffer)} bytes from {offset}")
        if buffer:
            fill(where, buffer, lambda done, rest: self._read(where, file, offset + done, rest))

    def put(self, name: str, data: Bytes) -> ObjectVersion:
        """Writes an object, whole or not at all, over what is there.

        Raises: StoreError, PlaceError.
        """

        def put() -> ObjectVersion:
            try:
                return self._put(name, data, "overwrite")
            except _ConditionError:
                raise ReadInterruptedError("the store says that a condition is not met, and there is none") from None

        return attempt(self / name, put)

    def create(self, name: str, data: bytes) -> ObjectVersion | None:
        """Writes an object if there is none of that name. None if there is one, with other content.

        Raises: as `put`.
        """
        return self._put_if(name, data, "create")

    def replace(self, name: str, data: bytes, version: ObjectVersion) -> ObjectVersion | None:
        """Writes an object over `version`. None if it is not that any more, nor has this content.

        Raises: as `put`.
        """
        known = {"e_tag": version.etag, "version": version.version}
        return self._put_if(name, data, {key: value for key, value in known.items() if value is not None})

    def write(self, name: str, data: Bytes) -> PlaceFile:
        """`put`, and proof that it has arrived: the answer's ETag is the MD5 of the bytes, or they are read back.

        Raises: StoreError when what is there is not what was sent, three times over.
        """
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        for _ in range(_MAX_WRITES):
            version = self.put(name, data)
            if version.etag and version.etag.strip('"') == digest:
                return PlaceFile(name, len(data), version.etag)
            found = self.current(name)
            if found is not None and found[0] == data:
                return PlaceFile(name, len(data), found[1].etag or "")
        raise StoreError(f"{self / name}: reads back other than it was written, {_MAX_WRITES} times")

    def write_parts(self, name: str, parts: Iterable[Bytes]) -> PlaceFile:
        """Writes a large object part by part, at most `MAX_PART_BYTES` each; it is there whole or not at all.

        What a process that is killed has sent stays in the bucket, unseen, until the bucket's rule for incomplete
        uploads removes it.

        Raises: StoreError when its size is not that of the parts.
        """
        import obstore

        size, sender = 0, self._with_retries()

        def counted() -> Iterator[Bytes]:
            nonlocal size
            for part in parts:
                size += len(part)
                yield part

        def put() -> None:
            obstore.put(sender, name, counted(), use_multipart=True, chunk_size=MAX_PART_BYTES, max_concurrency=4)

        try:
            self._ask(name, put)
        except ReadInterruptedError as error:
            raise StoreError(f"{self / name}: cannot be written ({error})") from None
        head = attempt(self / name, lambda: self._ask(name, lambda: obstore.head(self._store, name), missing=None))
        if head is None or head["size"] != size:
            got = "nothing" if head is None else f"{head['size']} bytes"
            raise StoreError(f"{self / name}: {size} bytes were written, {got} is there")
        return PlaceFile(name, size, head["e_tag"] or "")

    def current(self, name: str) -> tuple[bytes, ObjectVersion] | None:
        """A small object as it is at this moment, whatever the listing says; None if there is none.

        Raises: StoreError, PlaceError.
        """
        import obstore

        def read() -> tuple[bytes, ObjectVersion]:
            answer = obstore.get(self._store, name)
            data = bytes(answer.bytes())
            if len(data) != answer.meta["size"]:
                raise ReadInterruptedError(f"the answer has {len(data)} bytes of {answer.meta['size']}")
            return data, ObjectVersion(answer.meta["e_tag"], answer.meta["version"])

        return attempt(self / name, lambda: self._ask(name, read, missing=None))

    def delete(self, name: str) -> None:
        """Removes an object, if it is there. Raises: StoreError."""
        import obstore

        attempt(self / name, lambda: self._ask(name, lambda: obstore.delete(self._store, name), missing=None))
        with self._lock:
            if self._files is not None:
                self._files.pop(name, None)

    def forget(self) -> None:
        """What it knows of the bucket's files; it is listed again when it is next asked."""
        with self._lock:
            self._files = None

    def _put(self, name: str, data: Bytes, mode: Any) -> ObjectVersion:
        import obstore

        # In one request: parts of one that is killed would stay in the bucket, unseen and paid for.
        put = lambda: obstore.put(self._store, name, data, mode=mode, use_multipart=False)  # noqa: E731
        answer = self._ask(name, put, exists=None, missing=None)
        if answer is None:
            raise _ConditionError
        return ObjectVersion(answer["e_tag"], answer["version"])

    def _put_if(self, name: str, data: bytes, mode: Any) -> ObjectVersion | None:
        try:
            return attempt(self / name, lambda: self._put(name, data, mode))
        except _ConditionError:
            # An attempt before this one may have succeeded, and only its answer been lost.
            found = self.current(name)
            return found[1] if found is not None and found[0] == data else None

    def _listed(self) -> dict[str, PlaceFile]:
        import obstore

        with self._lock:
            if self._files is None:

                def listed() -> list[Any]:
                    return [item for page in obstore.list(self._store, chunk_size=1000) for item in page]

                found = attempt(self.where, lambda: self._ask("", listed, missing=[]))
                self._files = {
                    item["path"]: PlaceFile(item["path"], item["size"], item["e_tag"] or "") for item in found
                }
            return self._files

    def _read(self, where: str, file: PlaceFile, offset: int, rest: memoryview) -> None:
        import obstore

        num_read = 0
        options: Any = {"range": (offset, offset + len(rest))}
        if file.tag:
            options["if_match"] = file.tag
        try:
            answer = self._ask(file.name, lambda: obstore.get(self._store, file.name, options=options))
            size, span = answer.meta["size"], answer.range
            if size != file.size:
                raise StoreError(f"{where}: has {size} bytes now, expected {file.size}. Did it change meanwhile?")
            etag = answer.meta["e_tag"]
            if file.tag and etag and etag != file.tag:
                raise StoreError(f"{where}: has changed (ETag {file.tag}, now {etag})")
            if tuple(span) != (offset, offset + len(rest)):
                raise ReadInterruptedError(
                    f"the answer has bytes {span[0]} to {span[1]}, asked were those from {offset}"
                )
            for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
                view = memoryview(chunk)
                if num_read + len(view) > len(rest):
                    raise ReadInterruptedError("the answer is longer than asked", 0)
                rest[num_read : num_read + len(view)] = view
                num_read += len(view)
        except ReadInterruptedError as error:
            raise ReadInterruptedError(str(error), num_read, error.wait_s) from None
        except (StoreError, PlaceError):
            raise
        except Exception as error:
            raise ReadInterruptedError(_first_line(error), num_read) from None
        if num_read < len(rest):
            raise ReadInterruptedError(f"the answer ended at byte {offset + num_read}", num_read)

    def _ask[T](self, name: str, ask: Callable[[], T], *, missing: Any = ..., exists: Any = ...) -> T:
        """The store's answer; `missing` and `exists` are those for an object that is not there, or is.

        Raises: PlaceError saying what to do; StoreError; ReadInterruptedError for what may go better next time.
        """
        from obstore import exceptions

        where = self / name if name else self.where
        try:
            return ask()
        except (exceptions.NotFoundError, FileNotFoundError):
            if missing is not ...:
                return missing
            raise PlaceError(f"{where}: does not exist") from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            if exists is not ...:
                return exists
            raise StoreError(f"{where}: has changed meanwhile ({_first_line(error)})") from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise PlaceError(f"{where}: access refused ({_first_line(error)}). {_log_in(self._scheme)}") from None
        except exceptions.BaseError as error:
            raise ReadInterruptedError(_first_line(error)) from None


def _log_in(scheme: str) -> str:
    return f"Set {_CREDENTIALS[scheme]}"


def _first_line(error: BaseException) -> str:
    # The library's messages go on for pages, and repeat addresses that may be signed.
    text = str(error).split("\n", 1)[0].split("?", 1)[0]
    return text[:200] or type(error).__name__
