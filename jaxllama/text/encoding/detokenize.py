"""From token ids to text, a piece at a time, never splitting a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_TAIL_LENGTH = 16


class IncrementalDecoder(Protocol):
    """All pushes and the flush, joined, are the text of all ids, however the ids were cut into pushes."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""

    def flush(self) -> str:
        """What was held back: U+FFFD for the bytes of an unfinished character."""


class ByteDecoder:
    """Decodes tokens that stand for bytes each: byte-level BPE, SentencePiece, byte fallback.

    `token_bytes` gives the bytes of an id, `b""` for ids without text. Invalid UTF-8 becomes U+FFFD: one for each
    maximal part of a character, as byte-level BPE decoders do, or with `replace_each_byte` one for each byte, as
    SentencePiece does. `strips_space(id)` tells whether this token loses a leading space at the start of a text
    (SentencePiece's dummy prefix).

    `prompt_tail` is what comes before: the ids then continue its text.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        replace_each_byte: bool = False,
        strips_space: Callable[[int], bool] = lambda _: False,
        prompt_tail: Sequence[int] = (),
    ) -> None:
        self._token_bytes = token_bytes
        self._replace_each_byte = replace_each_byte
        self._strips_space = strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape" if replace_each_byte else "replace")
        self._at_start = len(prompt_tail) <= _TAIL_LENGTH
        # The tail may end inside a character that the first id completes.
        self.push(prompt_tail[-_TAIL_LENGTH:])

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        return self._decode(b"".join(map(self._bytes, ids)), final=False)

    def flush(self) -> str:
        """What was held back: U+FFFD for the bytes of an unfinished character."""
        return self._decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        data = self._token_bytes(token_id)
        if data and self._at_start:
            self._at_start = False
            if data[:1] == b" " and self._strips_space(token_id):
                return data[1:]
        return data

    def _decode(self, data: bytes, *, final: bool) -> str:
        text = self._utf8.decode(data, final)
        return _ESCAPED_BYTE.sub("\ufffd", text) if self._replace_each_byte else text


class WindowDecoder:
    """Decodes with any library decoder, by decoding a short window again for each token.

    The text of a token is what it adds to the text of the few tokens before it; it is held back while it ends in
    U+FFFD, an unfinished character. Slower than `ByteDecoder`, and for decoders whose text depends on distant tokens an
    approximation.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, prompt_tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_tail[-_TAIL_LENGTH:])
        self._num_read = len(self._window)
        self._num_unfinished = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        return "".join(map(self._push_one, ids))

    def flush(self) -> str:
        """What was held back."""
        return self._advance(self._text_added())

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        added = self._text_added()
        self._num_unfinished = self._num_unfinished + 1 if added.endswith("\ufffd") else 0
        # A character has at most four bytes: what is still unfinished after that never will be.
        if 0 < self._num_unfinished < 4:
            return ""
        return self._advance(added) if added else ""

    def _text_added(self) -> str:
        read = self._decode(self._window[: self._num_read])
        return self._decode(self._window)[len(read) :]

    def _advance(self, added: str) -> str:
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._num_unfinished = 0
        return added
