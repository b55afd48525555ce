"""What a place is: files by name, each read by ranges of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxllama.errors import PlaceError

MAX_SMALL_BYTES = 256 * 2**20


@dataclass(frozen=True)
class PlaceFile:
    """A file of a place, as it was when it was first asked for.

    `size` is in bytes. `tag` changes with the content: the ETag of a store, the time of change of a local file.
    `sha256` is what a store itself says the hash is, hexadecimal, or None.
    """

    name: str
    size: int
    tag: str
    sha256: str | None = None


class Place(ABC):
    """A folder of files, here or far away. Threads may share it.

    `where` names it in messages, `name` is the short name of what it holds. `file` is the one file that is meant, of a
    GGUF file, or None for the folder. `num_readers` ranges at once read it fast.
    """

    where: str
    name: str
    file: str | None = None
    num_readers: int = 4

    @abstractmethod
    def names(self) -> list[str]:
        """The names of the files directly in it, sorted."""

    @abstractmethod
    def all_names(self) -> list[str]:
        """The names of all files, also those in folders (`folder/file`), sorted."""

    @abstractmethod
    def stat(self, name: str) -> PlaceFile | None:
        """The file of that name (`folder/file` for one in a folder), None if there is none.

        Raises: PlaceError for a name or a link that leads out of the place; StoreError.
        """

    @abstractmethod
    def read_into(self, file: PlaceFile, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes from `offset`, trying again where a connection fails.

        Raises: StoreError when the file has changed, ends before, or cannot be read.
        """

    def read(self, name: str) -> bytes | None:
        """A small file, whole; None if there is none.

        Raises: PlaceError when it is larger than 256 MiB; as `stat` and `read_into`.
        """
        file = self.stat(name)
        if file is None:
            return None
        if file.size > MAX_SMALL_BYTES:
            raise PlaceError(f"{self / name}: larger than {MAX_SMALL_BYTES >> 20} MiB")
        data = bytearray(file.size)
        self.read_into(file, 0, memoryview(data))
        return bytes(data)

    def __str__(self) -> str:
        return self.where

    def __truediv__(self, name: str) -> str:
        """The file's name in messages."""
        return f"{self.where}/{name}"

    def close(self) -> None:  # noqa: B027
        """Ends idle connections and closes files that nobody reads; a later read opens them again.

        Whoever has read what he wanted calls it: a place is kept for as long as a model is, and descriptors are few.
        """
