"""Files as a manifest names them, and where those of arrays are written: a folder of this machine, or a bucket."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from jaxllama.errors import quote
from jaxllama.system.buffers import PAGE_BYTES
from jaxllama.system.hashing import HASHES, Hasher, hash_bytes, is_hash
from jaxllama.weights.places.bucket import BucketPlace
from jaxllama.weights.places.upload import Upload

type WriteTree = Callable[[Path, Callable[[str, Path], None]], None]
"""Called with the folder to make, and with what puts an array, by its name, where it belongs in it."""

PARAMS = "params"
_HASHED_BYTES = 8 * 2**20
_MIN_DIRECT_BYTES = 2**18


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and its hash, with that one's name in front (`blake3:…`)."""

    size: int
    hash: str

    @classmethod
    def of(cls, data: bytes | memoryview) -> FileRecord:
        """That of a file with this content."""
        return cls(len(data), hash_bytes(data))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FileRecord:
        """What `asdict` gave, or an entry of version 1. Raises: KeyError, TypeError, ValueError."""
        text = f"sha256:{value['sha256']}" if "sha256" in value else str(value["hash"])
        if not is_hash(text):
            raise ValueError(f"{quote(text)} is no hash that is known: {', '.join(HASHES)}")
        return cls(int(value["size"]), text)


class ArrayFiles(Protocol):
    """Takes the files of arrays, `params/NAME/0.0`. Threads may share it."""

    def begin(self, array: str) -> None:
        """Makes room for an array; what was written of it before is no more. Raises: OSError."""

    def write(self, name: str, data: bytes | memoryview) -> FileRecord:
        """One file, safely stored when this returns. Raises: OSError, StoreError."""

    def has(self, files: Mapping[str, FileRecord]) -> bool:
        """Whether each of `files` is there with its size."""

    def commit(self, write_tree: WriteTree) -> dict[str, FileRecord]:
        """Adds what `write_tree` makes of a folder in which it finds all arrays. Returns those files.

        Raises: OSError, StoreError, and what `write_tree` raises.
        """


class FolderFiles:
    """Arrays are staged in `folder/tensors/NAME` until Orbax has made `folder/params`. They outlive the process."""

    def __init__(self, folder: Path, arrays: Iterable[str]) -> None:
        self.folder = folder
        self.staging = folder / "tensors"
        self.staging.mkdir(exist_ok=True)
        # A commit that was killed has moved some arrays, or all of them, out of the staging folder.
        for params in folder.glob(f"{PARAMS}*"):
            for name in arrays:
                if (params / name).is_dir() and not (self.staging / name).exists():
                    os.rename(params / name, self.staging / name)
            shutil.rmtree(params)

    def begin(self, array: str) -> None:
        shutil.rmtree(self.staging / array, ignore_errors=True)
        (self.staging / array).mkdir()

    def write(self, name: str, data: bytes | memoryview) -> FileRecord:
        return write_file(self._path(name), data)

    def has(self, files: Mapping[str, FileRecord]) -> bool:
        return all(_size(self._path(name)) == record.size for name, record in files.items())

    def commit(self, write_tree: WriteTree) -> dict[str, FileRecord]:
        params = self.folder / PARAMS
        write_tree(params, lambda name, place: os.rename(self.staging / name, place))
        self.staging.rmdir()
        return {f"{PARAMS}/{path.name}": hash_file(path) for path in params.iterdir() if path.is_file()}

    def _path(self, name: str) -> Path:
        return self.staging / PurePosixPath(name).relative_to(PARAMS)


class BucketFiles:
    """Arrays are where they belong at once: without a manifest they are no checkpoint."""

    def __init__(self, bucket: Upload | BucketPlace) -> None:
        self.bucket = bucket

    def begin(self, array: str) -> None:
        """Objects of an earlier attempt are written over."""

    def write(self, name: str, data: bytes | memoryview) -> FileRecord:
        self.bucket.write(name, data)
        return FileRecord.of(data)

    def has(self, files: Mapping[str, FileRecord]) -> bool:
        """`Upload.begin` has compared sizes and ETags."""
        return True

    def commit(self, write_tree: WriteTree) -> dict[str, FileRecord]:
        with TemporaryDirectory(prefix="jaxllama-") as scratch:
            params = Path(scratch) / PARAMS
            write_tree(params, lambda name, place: None)
            return {f"{PARAMS}/{p.name}": self.write(f"{PARAMS}/{p.name}", p.read_bytes()) for p in params.iterdir()}


def write_file(path: Path, data: bytes | memoryview) -> FileRecord:
    """Writes a file and waits until it is on the disk. Raises: OSError, which names the file."""
    try:
        if not _write_direct(path, data):
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                # A full disk on a network file system shows here or never.
                os.fsync(file.fileno())
                if len(data) >= _MIN_DIRECT_BYTES and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        # Writes and fsync do not say which file it was.
        error.filename = error.filename or str(path)
        raise
    return FileRecord.of(data)


def _write_direct(path: Path, data: bytes | memoryview) -> bool:
    """Writes a large file past the system's cache. False where data, file system or system do not allow that.

    Either way the cache does not keep it. Memory for all of a model, new as it is, costs more time than converting it
    where a virtual machine gets it from its host (bench/LOG.md), and takes that of what others read.
    """
    address = np.frombuffer(data, np.uint8).ctypes.data if len(data) >= _MIN_DIRECT_BYTES else 1
    if address % PAGE_BYTES or len(data) % PAGE_BYTES or not hasattr(os, "O_DIRECT"):
        return False
    descriptor, done = -1, 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_DIRECT, 0o666)
        while done < len(data):
            done += os.write(descriptor, memoryview(data)[done:])
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return True


def hash_file(path: Path) -> FileRecord:
    """That of a file of this machine, read once."""
    hasher = Hasher()
    with path.open("rb") as file:
        while data := file.read(_HASHED_BYTES):
            hasher.update(data)
        return FileRecord(file.tell(), hasher.value())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
