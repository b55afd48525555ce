"""Memory for what is on its way, taken once and used again.

New pages cost more than what is done with them: the system clears them, and a virtual machine may first have to get
them from its host (bench/LOG.md).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

PAGE_BYTES = 4096


def page_aligned(num_bytes: int) -> np.ndarray:
    """New memory that begins where a page does, uint8 `[num_bytes]`."""
    memory = np.empty(num_bytes + PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % PAGE_BYTES
    return memory[start : start + num_bytes]


class Buffers:
    """Lends parts of one block of memory, each time the lowest that is free: as little as possible is ever touched.

    Threads must take turns.
    """

    def __init__(self, num_bytes: int) -> None:
        self._memory = page_aligned(num_bytes)
        self._free = [(0, num_bytes // PAGE_BYTES * PAGE_BYTES)]
        self._lent: dict[int, int] = {}

    def take(self, num_bytes: int) -> UInt8[np.ndarray, " bytes"] | None:
        """uint8 `[num_bytes]` from the start of a page; None while there is no room for it."""
        size = -(-max(1, num_bytes) // PAGE_BYTES) * PAGE_BYTES
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(start + size, length - size)] if length > size else []
                buffer = self._memory[start : start + num_bytes]
                self._lent[buffer.ctypes.data] = size
                return buffer
        return None

    def give_back(self, buffer: UInt8[np.ndarray, " bytes"]) -> None:
        """What `take` gave, or memory that is the caller's own."""
        if (size := self._lent.pop(buffer.ctypes.data, None)) is None:
            return
        start = buffer.ctypes.data - self._memory.ctypes.data
        joined: list[tuple[int, int]] = []
        for place, length in sorted([*self._free, (start, size)]):
            if joined and sum(joined[-1]) == place:
                joined[-1] = joined[-1][0], joined[-1][1] + length
            else:
                joined.append((place, length))
        self._free = joined
