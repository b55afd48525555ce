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
