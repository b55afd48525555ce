"""Reads the header of a GGUF file: metadata and where each tensor lies.

Our own reader, because every count and offset of the header is checked against the file before it is used, and because
a vocabulary of 128,000 strings takes a fraction of a second instead of many. Dequantisation is the gguf package's.

Source: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from jaxllama.errors import ConversionError, quote
from jaxllama.weights.sources.source import SourceFile

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_TENSORS = 1_000_000
_MAX_DIMS = 4
# Many times the longest list of any tokenizer; a longer one is an attempt to fill the memory.
_MAX_ARRAY = 10_000_000
_MAX_STRING_BYTES = 64 * 2**20
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place. `shape` is in C order (GGUF writes dimensions the other way round)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (arrays as lists) and the tensors by name, in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(file: SourceFile) -> GgufHeader:
    """Reads and checks the header.

    Raises: ConversionError when it is malformed or a tensor does not lie inside the file.
    """
    cursor = _Cursor(file)
    if cursor.take(4) != b"GGUF":
        raise ConversionError(f"{file.path}: not a GGUF file (wrong magic)")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ConversionError(f"{file.path}: GGUF version {version} is not supported, expected 2 or 3 (little-endian)")
    num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
    if num_tensors > _MAX_TENSORS or num_fields > _MAX_TENSORS:
        raise cursor.error(f"{num_tensors} tensors and {num_fields} metadata fields are too many")
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.string()
        if key in metadata:
            raise cursor.error(f"metadata key {quote(key)} appears twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment must be a power of two, got {quote(alignment)}")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(metadata, _place_tensors(file, infos, data_start))


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    name = cursor.string()
    num_dims = cursor.scalar("I")
    if num_dims > _MAX_DIMS:
        raise cursor.error(f"{quote(name)} has {num_dims} dimensions, expected at most {_MAX_DIMS}")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_dims)]))
    type_id = cursor.scalar("I")
    try:
        dtype = gguf.GGMLQuantizationType(type_id).name
    except ValueError:
        raise cursor.error(f"{quote(name)} has unknown type {type_id}") from None
    return name, shape, dtype, cursor.scalar("Q")


def _place_tensors(
    file: SourceFile, infos: list[tuple[str, tuple[int, ...], str, int]], data_start: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    end, last = data_start, ""
    for name, shape, dtype, relative in sorted(infos, key=lambda info: info[3]):
        where = f"{file.path}: {quote(name)}"
        if name in tensors:
            raise ConversionError(f"{where} appears twice")
        if not name or ".." in name or any(ord(char) < 32 or char in "/\\" for char in name):
            raise ConversionError(f"{where} is not a tensor name that can be used safely")
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
        if not shape or shape[-1] % block:
            raise ConversionError(
                f"{where} has shape {list(shape)}, expected rows of a multiple of {block} for {dtype}"
            )
        num_bytes = math.prod(shape) // block * block_bytes
        offset = data_start + relative
        if offset < end:
            raise ConversionError(f"{where} overlaps {quote(last)}")
        if offset + num_bytes > file.size:
            raise ConversionError(
                f"{where} ends at byte {offset + num_bytes} but the file has {file.size}. Was the download complete?"
            )
        tensors[name] = GgufTensor(name, shape, dtype, offset, num_bytes)
        end, last = offset + num_bytes, name
    return tensors


class _Cursor:
    """Reads forward through the header, a block at a time, never past the end of the file."""

    def __init__(self, file: SourceFile) -> None:
        self.position = 0
        self._file = file
        self._block = b""
        self._block_start = 0

    def error(self, reason: str) -> ConversionError:
        return ConversionError(f"{self._file.path}: GGUF header: {reason} (at byte {self.position})")

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self._file.size - self.position:
            raise self.error(
                f"{num_bytes} bytes expected, {self._file.size - self.position} left. Was the download complete?"
            )
        start = self.position - self._block_start
        if start + num_bytes > len(self._block):
            self._block_start, start = self.position, 0
            size = min(max(num_bytes, _BLOCK_BYTES), self._file.size - self.position)
            self._block = self._file.read_hashed(self.position, size).tobytes()
        self.position += num_bytes
        return self._block[start : start + num_bytes]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        if length > _MAX_STRING_BYTES:
            raise self.error(f"a text of {length} bytes is too long")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"text is not UTF-8 ({error.reason})") from None

    def value(self, type_id: int) -> Any:
        if type_id == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if type_id == _STRING:
            return self.string()
        return self.scalar(self._code(type_id))

    def _array(self, type_id: int, length: int) -> list[Any]:
        if type_id == _ARRAY:
            raise self.error("arrays of arrays are not supported")
        if length > _MAX_ARRAY:
            raise self.error(f"an array of {length} is too long")
        if type_id == _STRING:
            # Every string has at least its 8 bytes of length, so a false count runs into the end of the file.
            read: Callable[[], str] = self.string
            return [read() for _ in range(length)]
        dtype = np.dtype("<" + self._code(type_id))
        return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()

    def _code(self, type_id: int) -> str:
        if type_id not in _SCALARS:
            raise self.error(f"unknown metadata type {type_id}")
        return _SCALARS[type_id]
