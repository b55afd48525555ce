"""Hashes of files, each with its name in front (`blake3:…`), so that what another one was used for stays readable.

BLAKE3 is what is written: on a core with AVX2 it takes half the time of sha256 with the processor's own instructions,
and a third without them (bench/LOG.md). The Hugging Face hub says sha256.
"""

from __future__ import annotations

import hashlib
from typing import Any

from blake3 import blake3

HASHES = ("blake3", "sha256")


class Hasher:
    """A hash that takes bytes piece by piece."""

    def __init__(self, name: str = "blake3") -> None:
        self.name = name
        self._state: Any = blake3() if name == "blake3" else hashlib.new(name)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Other threads run meanwhile."""
        self._state.update(data)

    def value(self) -> str:
        """Of all bytes so far: the name, a colon, hexadecimal digits."""
        return f"{self.name}:{self._state.hexdigest()}"


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """`Hasher.value` of `data`."""
    hasher = Hasher()
    hasher.update(data)
    return hasher.value()


def is_hash(text: str) -> bool:
    """Whether a `Hasher` can give it."""
    name, _, digits = text.partition(":")
    return name in HASHES and len(digits) == 64 and not digits.strip("0123456789abcdef")
