"""The process's own memory."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Returns to the system what the process has freed and the C library still keeps, where that can be asked of it.

    After compilation it is 100 MB and more (bench/LOG.md).
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
