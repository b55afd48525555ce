"""A folder of this machine."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path

from jaxllama.errors import PlaceError, StoreError
from jaxllama.weights.places.place import Place, PlaceFile

_MAX_OPEN_FILES = 64
# Linux reads at most 2 GiB a call.
_MAX_READ_BYTES = 2**30


class LocalPlace(Place):
    """A folder, or one file of it. `confined`: a link that leads out of it is refused.

    The Hugging Face cache keeps its files elsewhere: `models--X/snapshots/REV/name` may link into `models--X/blobs`.
    """

    def __init__(self, path: Path, *, confined: bool = True) -> None:
        is_file = not path.is_dir()
        self.folder = path.parent if is_file else path
        self.file = path.name if is_file else None
        self.where = str(self.folder)
        self.name = path.name if is_file else path.resolve().name
        self._confined = confined
        self._root = self.folder.resolve()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise PlaceError(f"{self.where}: cannot be read ({error.strerror})") from None

    def all_names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_dir())

    def stat(self, name: str) -> PlaceFile | None:
        path = self.folder / name
        if not path.exists() and not path.is_symlink():
            return None
        try:
            status = self._resolve(name).stat()
        except OSError as error:
            raise PlaceError(f"{path}: cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise PlaceError(f"{path}: not a regular file")
        return PlaceFile(name, status.st_size, str(status.st_mtime_ns))

    def read_into(self, file: PlaceFile, offset: int, buffer: memoryview) -> None:
        done, where = 0, self / file.name
        try:
            descriptor = self._borrow(file)
            try:
                while done < len(buffer):
                    part = buffer[done : done + _MAX_READ_BYTES]
                    got = os.preadv(descriptor, [part], offset + done)
                    if got == 0:
                        raise StoreError(
                            f"{where}: ends at byte {offset + done}, expected {file.size} bytes. "
                            "Did it change meanwhile?"
                        )
                    done += got
            finally:
                self._give_back(descriptor)
        except OSError as error:
            raise StoreError(f"{where}: cannot be read at byte {offset + done} ({error.strerror})") from None

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                if descriptor not in self._users:
                    os.close(descriptor)
            self._open.clear()

    def _resolve(self, name: str) -> Path:
        """The real path of a file, which must lie in the folder, or where the Hugging Face cache keeps its files."""
        path, root = self.folder / name, self._root
        if not self._confined:
            return path
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise PlaceError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        allowed = [root]
        if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
            allowed.append(root.parent.parent / "blobs")
        # A file that was named itself may be a link to anywhere: whoever named it chose that.
        if name != self.file and not any(real.is_relative_to(place) for place in allowed):
            raise PlaceError(f"{path}: is a link that leads out of the folder, to {real}")
        return real

    def _borrow(self, file: PlaceFile) -> int:
        """An open descriptor, which stays open until it is given back."""
        with self._lock:
            descriptor = self._open.get(file.name)
            if descriptor is None:
                descriptor = os.open(self._resolve(file.name), os.O_RDONLY | os.O_CLOEXEC)
                self._open[file.name] = descriptor
            self._open.move_to_end(file.name)
            self._users[descriptor] = self._users.get(descriptor, 0) + 1
            for name, other in list(self._open.items()):
                if len(self._open) <= _MAX_OPEN_FILES:
                    break
                if other not in self._users:
                    os.close(self._open.pop(name))
        return descriptor

    def _give_back(self, descriptor: int) -> None:
        with self._lock:
            self._users[descriptor] -= 1
            if not self._users[descriptor]:
                del self._users[descriptor]
                if descriptor not in self._open.values():
                    os.close(descriptor)
