"""As much of Protocol Buffers as a SentencePiece model needs, to read and to write.

sentencepiece brings a module for its own models, which would not do: importing it where transformers has imported its
copy is an error, and the other way round ("duplicate file name sentencepiece_model.proto"), and it refuses any protobuf
older than the one it was made with (7.36.1 for sentencepiece 0.2.3). A notebook has both.

Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}


def fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number, first and end byte of the value of each field of the message in `data[start:end]`.

    Raises: IndexError, ValueError if it is damaged.
    """
    at = start
    while at < end:
        key, at = _read_varint(data, at)
        wire_type = key & 7
        if wire_type == _VARINT:
            _, stop = _read_varint(data, at)
        elif wire_type == _BYTES:
            size, at = _read_varint(data, at)
            stop = at + size
        elif wire_type in _FIXED_BYTES:
            stop = at + _FIXED_BYTES[wire_type]
        else:
            raise ValueError("unknown wire type")
        if stop > end:
            raise ValueError("field past the end")
        yield key >> 3, at, stop
        at = stop


def field(number: int, value: int | bytes) -> bytes:
    """One field of a message: an integer (a negative one takes ten bytes), or a text or a message of its own."""
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("varint too long")


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(data) + bytes([value])
