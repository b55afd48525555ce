"""A folder of a bucket, `gs://bucket/path` or `s3://bucket/path`, or one GGUF file there.

Through obstore: its requests run outside Python, which leaves the two cores to the rest; it has conditional puts for
both stores and takes credentials as their own tools do (bench/LOG.md compares).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
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
# Our own retries read on where the connection was lost; the library's would begin again.
_NO_RETRY = {"max_retries": 0}


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
        store = kind(parts.netloc, prefix=prefix or None, client_options=_CLIENT, retry_config=_NO_RETRY)
    except obstore.exceptions.BaseError as error:
        raise PlaceError(f"{url}: cannot be opened ({_first_line(error)}). {_log_in(parts.scheme)}") from None
    where = f"{root}/{prefix}".rstrip("/")
    return BucketPlace(store, parts.scheme, where, last if is_file else None, name=last or parts.netloc)


@dataclass(frozen=True)
class PutVersion:
    """What a conditional put replaces."""

    etag: str | None
    version: str | None


class BucketPlace(Place):
    """A folder of a bucket. It is listed once, when it is first asked for a file."""

    num_readers = 16

    def __init__(self, store: Any, scheme: str, where: str, file: str | None, name: str) -> None:
        self._store = store
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

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Writes an object, whole or not at all, over what is there.

        Raises: StoreError.
        """
        self._put(name, data, None)

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object if there is none of that name. Returns whether it did.

        Raises: StoreError.
        """
        return self._put(name, data, "create")

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

    def _put(self, name: str, data: bytes | memoryview, mode: Any) -> bool:
        import obstore

        where = self / name

        def put() -> bool:
            # In one request: parts of one that is killed would stay in the bucket, unseen and paid for.
            obstore.put(self._store, name, data, mode=mode or "overwrite", use_multipart=False)
            return True

        return bool(attempt(where, lambda: self._ask(name, put, exists=False)))

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
