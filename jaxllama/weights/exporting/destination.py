"""Where an export is written: a folder that is there whole or not, or one of a bucket, complete with config.json.

.NAME.exporting/     beside the destination, for as long as the export takes; what a killed one leaves, the next removes
    lock             held by the process that writes
    export/          becomes the destination by one rename
    old/             the export that --force replaces, until then
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from jaxllama.errors import ConversionError, StoreError
from jaxllama.system.staging import check_replaceable, is_ours, locked_folder, put_in_place
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.exporting.shards import INDEX, WRITER
from jaxllama.weights.places.upload import Upload, open_upload
from jaxllama.weights.sources.safetensors import SIDECARS

LAST = "config.json"
"""What makes a model of the files."""
_MAX_HEADER_BYTES = 100_000_000


class Destination(Protocol):
    """Takes files one after the other. What is given last, config.json, is what makes a model of them."""

    def write(self, name: str, num_bytes: int, parts: Iterable[bytes | UInt8[np.ndarray, " bytes"]]) -> None:
        """A file of `num_bytes` bytes, in parts. Raises: StoreError; OSError when the disk is full or unwritable."""


class _Bucket:
    """A folder of a bucket; a file that a former run has written is passed over."""

    def __init__(self, upload: Upload, done: Collection[str]) -> None:
        self.last = b""
        self._upload = upload
        self._done = done

    def write(self, name: str, num_bytes: int, parts: Iterable[bytes | UInt8[np.ndarray, " bytes"]]) -> None:
        if name == LAST:
            self.last = b"".join(map(bytes, parts))
        elif name not in self._done:
            self._upload.write_parts(name, (memoryview(part) for part in parts))
            self._upload.record(name, [name])


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, num_bytes: int, parts: Iterable[bytes | UInt8[np.ndarray, " bytes"]]) -> None:
        path = self._folder / name
        try:
            with path.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                # A full disk on a network file system shows here or never.
                os.fsync(file.fileno())
        except OSError as error:
            # Writes and fsync do not say which file it was.
            error.filename = error.filename or str(path)
            raise


def open_destination(
    destination: Path | str, identity: Mapping[str, Any], *, force: bool
) -> AbstractContextManager[Destination]:
    """A folder of this machine, or of a bucket if it is an address; `identity` says what is written, for a bucket's
    unfinished export to be resumed.

    Raises: ConversionError or PlaceError when the destination exists and may not be replaced; StoreError when it is in
        use.
    """
    if isinstance(destination, Path):
        return _open_folder(destination, force=force)
    return _open_bucket(destination, identity, force=force)


@contextlib.contextmanager
def _open_bucket(url: str, identity: Mapping[str, Any], *, force: bool) -> Iterator[Destination]:
    with open_upload(url, LAST, force=force) as upload:
        bucket = _Bucket(upload, upload.begin(identity))
        yield bucket
        upload.finish(bucket.last, owns=lambda name: name.endswith(".safetensors") or name in (INDEX, *SIDECARS))


@contextlib.contextmanager
def _open_folder(destination: Path, *, force: bool) -> Iterator[Destination]:
    """A folder beside `destination`, which takes its place when the body ends, and goes when it fails."""
    _check_destination(destination, force)
    root = destination.parent / f".{destination.name}.exporting"
    if not is_ours(root):
        raise ConversionError(f"{root}: is in the way and not the exporter's; move it")
    old, folder = root / "old", root / "export"
    with contextlib.ExitStack() as stack:
        try:
            # What stood at the destination is never thrown away before its successor is there.
            stack.enter_context(locked_folder(root, keep=lambda: old.exists() and not destination.exists()))
        except BlockingIOError:
            raise StoreError(f"{destination}: another export is writing it") from None
        if old.exists() and not destination.exists():
            os.rename(old, destination)
        for left in (old, folder):
            shutil.rmtree(left, ignore_errors=True)
        _check_destination(destination, force)
        folder.mkdir()
        yield _Folder(folder)
        put_in_place(folder, destination, old=old)


def _check_destination(destination: Path, force: bool) -> None:
    expected = "was not written by jaxllama export"
    check_replaceable(destination, ConversionError, is_known=_is_export, expected=expected, force=force)


def _is_export(folder: Path) -> bool:
    files = list(folder.glob("*.safetensors"))
    return bool(files) and all(map(_is_ours, files))


def _is_ours(path: Path) -> bool:
    """Whether a file says that it was written here."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(min(length, _MAX_HEADER_BYTES)), path, ConversionError)
    except (OSError, ConversionError):
        return False
    metadata = header.get("__metadata__")
    return isinstance(metadata, dict) and metadata.get("writer") == WRITER
