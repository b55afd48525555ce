"""Locks on open files, which the system lets go when their process ends, however it ends."""

from __future__ import annotations

import os
import sys
from typing import IO

if sys.platform == "win32":
    import msvcrt

    # Far beyond the end, where nobody reads: Windows keeps others from the bytes that are locked.
    _LOCKED_BYTE = 2**62
else:
    try:
        import fcntl
    except ModuleNotFoundError:  # Some small systems have none, nor another process to lock out.
        fcntl = None  # type: ignore[assignment]


def lock(file: IO[bytes] | IO[str] | int) -> None:
    """Locks an open file (or its descriptor) for as long as it is open.

    Raises: BlockingIOError if another process has locked it, or this one by another descriptor.
    """
    fd = file if isinstance(file, int) else file.fileno()
    if sys.platform == "win32":
        position = os.lseek(fd, 0, os.SEEK_CUR)
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from None
        finally:
            os.lseek(fd, position, os.SEEK_SET)
    elif fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
