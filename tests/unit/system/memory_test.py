"""Freed memory goes back to the system, and garbage is looked for where it may be."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import pytest

from jaxllama.system.memory import collecting_later, give_back


def resident_kb() -> int:
    found = re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_freed_between_blocks_in_use_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    # Too small for pages of their own, which would go back at once; every 100th stays, so that the heap's end does not
    # move down either.
    blocks = [libc.malloc(ctypes.c_size_t(60_000)) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, 60_000)
    for i, block in enumerate(blocks):
        if i % 100:
            libc.free(block)
    before = resident_kb()
    give_back()
    after = resident_kb()
    for block in blocks[::100]:
        libc.free(block)
    assert before - after > 60_000


def test_what_a_block_leaves_is_never_looked_through_again():
    frozen = gc.get_freeze_count()
    try:
        with collecting_later():
            assert not gc.isenabled()
            left = [[i] for i in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(left)
        assert not any(each is left for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_collection_goes_on_after_a_block_that_failed():
    try:
        with pytest.raises(ValueError, match="no model"), collecting_later():
            raise ValueError("no model")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
