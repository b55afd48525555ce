"""The two files of a batch: lines of requests, and lines of answers that grow and may be taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jaxllama.errors import JaxLlamaError, quote
from jaxllama.system.locks import lock
from jaxllama_serving.http.events import to_json
from jaxllama_serving.protocol.errors import ApiError
from jaxllama_serving.protocol.strict_json import decode

URLS = ("/v1/chat/completions", "/v1/completions")
MAX_ID_CHARS = 512
MAX_SHOWN = 5
_HEAD = b'{"id":"batch_req_'
"""How every line of the output begins, as `to_json` writes it."""


class BatchError(JaxLlamaError, ValueError):
    """The input of a batch cannot be read, or its output file is another's.

    **Usually** a `custom_id` is used twice, or OUT has answers to another input: an answer is known by a hash of
    the line it answers, so lines may be added or moved between two runs, not changed or removed.

    **What to do:** mend the line that is named, or give another file for the answers.
    """


class LineError(Exception):
    """One line of the input is no request; the message says why."""


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line of the input is. `id` is a hash of what it says: its answer is known by it.

    A line without a usable `custom_id` is known by its number too, since another may say the same.
    """

    number: int
    offset: int
    size: int
    id: str
    custom_id: str | None


class InputFile:
    """The requests of a batch. Lines are read again when their turn comes, so a large file takes little memory.

    Raises: BatchError for a file that cannot be read, has no line, or has a custom_id twice.
    """

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self._path, self._max_line_bytes = path, max_line_bytes
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise BatchError(f"{path}: {error.strerror}") from None
        with_ids: dict[str, int] = {}
        doubles: list[str] = []
        self.lines: list[Line] = []
        for number, offset, raw in _split(self._file):
            custom_id = self._custom_id(raw)
            if custom_id is not None:
                first = with_ids.setdefault(custom_id, number)
                if first != number:
                    doubles.append(f"{quote(custom_id)} on lines {first} and {number}")
            self.lines.append(Line(number, offset, len(raw), _id(raw, custom_id, number), custom_id))
        if doubles:
            raise BatchError(f"{path}: every custom_id must be used once: {_some(doubles)}")
        if not self.lines:
            raise BatchError(f"{path}: there is no request in it")

    def read(self, line: Line) -> dict[str, Any]:
        """Returns a line's request, with its url and its body checked to be there.

        Raises: LineError for a line that is no request, BatchError if the file has changed.
        """
        raw = os.pread(self._file.fileno(), line.size, line.offset)
        if _id(raw, line.custom_id, line.number) != line.id:
            raise BatchError(f"{self._path}: line {line.number} has changed while the batch ran")
        return _parse(raw, self._max_line_bytes)

    def is_same(self, other: os.stat_result) -> bool:
        """Whether this is that file."""
        return os.path.samestat(os.fstat(self._file.fileno()), other)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _custom_id(self, raw: bytes) -> str | None:
        try:
            custom_id: str = _parse(raw, self._max_line_bytes, id_only=True)["custom_id"]
        except LineError:
            return None
        return custom_id


def _split(file: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Lines with their numbers and offsets, without blank ones."""
    offset = 0
    for number, raw in enumerate(file, start=1):
        if raw.strip():
            yield number, offset, raw
        offset += len(raw)


def _id(raw: bytes, custom_id: str | None, number: int) -> str:
    said = raw.strip() if custom_id is not None else b"%d %s" % (number, raw.strip())
    return f"batch_req_{hashlib.sha256(said).hexdigest()[:24]}"


def _parse(raw: bytes, max_bytes: int, *, id_only: bool = False) -> dict[str, Any]:
    if len(raw) > max_bytes:
        raise LineError(f"it has {len(raw)} bytes, at most {max_bytes} are allowed")
    try:
        data = decode(raw.strip())
    except ApiError as error:
        reason = error.message.replace("The body", "it", 1).replace("the body", "the line").removesuffix(".")
        raise LineError(reason) from None
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise LineError(f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters, got {quote(custom_id)}")
    if id_only:
        return data
    unknown = [quote(name) for name in data if name not in ("custom_id", "method", "url", "body")]
    if unknown:
        raise LineError(f"it has unknown fields: {_some(unknown)}")
    if data.get("method") != "POST":
        raise LineError(f"method must be 'POST', got {quote(data.get('method'))}")
    if data.get("url") not in URLS:
        raise LineError(f"url must be one of {', '.join(URLS)}, got {quote(data.get('url'))}")
    body = data.get("body")
    if not isinstance(body, dict):
        raise LineError(f"body must be an object, got {quote(body)}")
    if body.get("stream"):
        raise LineError("body.stream: a batch has no streams")
    return data


class OutputFile:
    """Answers, one a line in any order. What has been appended survives a kill and a power cut.

    A last line without its end (its writing was cut short) is cut off. One process at a time holds the file.

    Raises: BatchError for a file that holds anything but answers to `lines`, or that another process holds; OSError.
    """

    def __init__(self, path: Path, lines: Iterable[Line]) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BatchError(f"{path}: {error.strerror}") from None
        try:
            try:
                lock(self._fd)
            except BlockingIOError:
                raise BatchError(f"{path}: another process writes to it") from None
            self.done, end = self._check({line.id: line for line in lines})
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
            os.fsync(self._fd)
            _sync_folder(path)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def stat(self) -> os.stat_result:
        """The file's identity."""
        return os.fstat(self._fd)

    def append(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines and waits until the disk has them. Raises: OSError, for instance of a full disk."""
        data = memoryview(b"".join(to_json(answer) + b"\n" for answer in answers))
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def _check(self, lines: Mapping[str, Line]) -> tuple[set[str], int]:
        """Returns the ids answered, and where the last whole line ends."""
        done: set[str] = set()
        foreign: list[str] = []
        end = 0
        with open(os.dup(self._fd), "rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    if not (raw.startswith(_HEAD) or _HEAD.startswith(raw) or not raw.strip(b"\0")):
                        foreign.append(f"line {number} is no answer of a batch")
                    break
                end += len(raw)
                name, custom_id = _answered(raw)
                if name is None:
                    foreign.append(f"line {number} is no answer of a batch")
                elif name not in lines:
                    foreign.append(f"line {number} answers {quote(custom_id)}")
                elif name in done:
                    foreign.append(f"line {number} answers {quote(custom_id)} again")
                else:
                    done.add(name)
        if foreign:
            raise BatchError(
                f"{self.path} belongs to another input, or its input has changed: {_some(foreign)}. Give another file"
            )
        return done, end


def _answered(raw: bytes) -> tuple[str | None, Any]:
    try:
        answer = json.loads(raw)
        name = answer["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, None
    return (name, answer.get("custom_id")) if isinstance(name, str) else (None, None)


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _some(texts: list[str]) -> str:
    more = f" (and {len(texts) - MAX_SHOWN} more)" if len(texts) > MAX_SHOWN else ""
    return "; ".join(texts[:MAX_SHOWN]) + more
