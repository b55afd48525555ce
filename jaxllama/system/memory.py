"""The process's own memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


def give_back() -> None:
    """Returns to the system what the process has freed and the C library still keeps, where that can be asked of it.

    After compilation it is 100 MB and more. What only Python's search for cycles would free is next to nothing, and
    the search through all that was loaded takes 0.2 s and more (bench/LOG.md).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def collecting_later() -> Iterator[None]:
    """Has Python look for cycles of garbage only after the block, and then never among what the block has left.

    Loading and compiling make millions of objects that stay: looking through them took an eighth of a warm start's CPU
    time (bench/LOG.md), and would hold up every stream for a moment later.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
