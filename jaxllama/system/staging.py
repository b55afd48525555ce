"""Folders that are made beside their destination and put there by one rename, so that they are there whole or not."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxllama.errors import JaxLlamaError
from jaxllama.system.locks import lock

_LOCK = "lock"


def resolve_destination(dst: str | os.PathLike[str], error: type[JaxLlamaError]) -> Path:
    """The real path of `dst`, where a folder may be put; it may be a link to one.

    Raises: `error` for a link, at `dst` or on the way to it, that leads nowhere.
    """
    path = Path(dst).expanduser().absolute()
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise error(
                f"{path}: {'is' if place == path else f'{place} is'} a link to {os.readlink(place)}, which leads to "
                "nothing; remove it, or make the folder that it leads to"
            )
    return Path(os.path.realpath(path))


def check_apart(source: Path, destination: Path, error: type[JaxLlamaError]) -> None:
    """Refuses a destination in the source's folder, or around it: writing one would change the other.

    Raises: `error`.
    """
    folders = [source] if source.is_dir() else []
    real = source.resolve()
    snapshot = real if source.is_dir() else source.parent.resolve()
    if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
        folders.append(snapshot.parent.parent)  # the Hugging Face cache, which keeps the files in another folder of it
    if any(_is_within(destination, folder) for folder in folders):
        raise error(f"{destination}: is inside the source {source}, which stays as it is; choose another folder")
    if _is_within(real, destination):
        raise error(f"{destination}: holds the source {source}; choose another folder")


def check_replaceable(
    destination: Path, error: type[JaxLlamaError], *, is_known: Callable[[Path], bool], expected: str, force: bool
) -> None:
    """Refuses a destination that something is at: all but an empty folder, and with `force` one that `is_known`.

    `expected` says in the message what the folder is not, as in "is not a checkpoint".

    Raises: `error`.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise error(f"{destination}: exists and is not a folder")
    if os.path.ismount(destination):
        raise error(f"{destination}: is a mount point, which cannot be replaced in one step; give a folder inside it")
    if not any(destination.iterdir()):
        return
    if not is_known(destination):
        raise error(f"{destination}: exists, is not empty and {expected}; choose another folder")
    if not force:
        raise error(f"{destination}: exists; give --force to replace it")


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or would lie in it, by whatever name: links, mounts, letters in another case."""
    if not folder.exists():
        return False
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))


@contextlib.contextmanager
def locked_folder(root: Path, *, keep: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Makes the folder `root` if it is not there and locks it; removes it at the end unless `keep` says otherwise.

    Raises: BlockingIOError when it is another process's.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as file:
        lock(file)
        try:
            yield
        finally:
            kept = root.exists() and keep()
            if not kept:
                shutil.rmtree(root, ignore_errors=True)
    if sys.platform == "win32" and not kept:
        # Windows removes no file that is open.
        shutil.rmtree(root, ignore_errors=True)


def is_ours(root: Path) -> bool:
    """Whether `locked_folder` made `root`, or may: it is not there, or it is empty."""
    return not root.is_dir() or (root / _LOCK).exists() or not any(root.iterdir())


def put_in_place(folder: Path, destination: Path, *, old: Path | None = None) -> None:
    """Renames `folder` to `destination`. What is there, an empty folder at most, moves to `old` if that is given.

    Raises: OSError.
    """
    if destination.exists():
        if old is None:
            destination.rmdir()
        else:
            os.rename(destination, old)
    os.rename(folder, destination)
