"""Laws of hashes that name themselves."""

from __future__ import annotations

import hashlib

import pytest

from jaxllama.system.hashing import Hasher, hash_bytes, is_hash


@pytest.mark.parametrize(
    ("name", "want"),
    [
        # The first of the BLAKE3 team's test vectors, of no bytes.
        ("blake3", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        ("sha256", hashlib.sha256(b"").hexdigest()),
    ],
)
def test_a_hash_is_that_of_its_name(name: str, want: str) -> None:
    assert Hasher(name).value() == f"{name}:{want}"
    assert is_hash(f"{name}:{want}")


def test_pieces_do_not_show() -> None:
    hasher = Hasher()
    for piece in (b"ab", bytearray(b"c"), memoryview(b"def")):
        hasher.update(piece)
    assert hasher.value() == hash_bytes(b"abcdef")


@pytest.mark.parametrize("text", ["", "blake3", "blake3:", "blake3:12", "md5:" + "0" * 64, "sha256:" + "G" * 64])
def test_what_is_no_hash_is_known(text: str) -> None:
    assert not is_hash(text)
