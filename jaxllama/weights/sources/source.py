"""What a source checkpoint is to the rest of the converter, and how its bytes are read.

Two readers make a `Source`: `safetensors_source` and `gguf_source`. Both check everything that can be checked before
a weight is read, and neither runs or unpickles anything from the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from jaxllama.errors import ConversionError, PlaceError, StoreError
from jaxllama.system.hashing import Hasher
from jaxllama.weights.places import LocalPlace, Place

MAX_JSON_BYTES = 256 * 2**20
_GAP_BLOCK_BYTES = 8 * 2**20
# What waits for the bytes before it to be hashed.
_MAX_EARLY_BYTES = 64 * 2**20
# When too much waits, a gap of this size (alignment, a tensor that nobody needs) is read once more.
_SMALL_GAP_BYTES = 2**18
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The block types of GGML that the gguf package dequantises.
BLOCK_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip
# What the parts of quantised matrices are stored as.
_PARTS = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class SourceFile:
    """A source file, read by position and hashed on the way. Threads may share it.

    Bytes that `read_hashed` brings in the order of the file, or nearly, are hashed as they pass. What was skipped, or
    came much too early, is read again for the hash.
    """

    def __init__(self, place: Place, name: str, hash_name: str = "blake3") -> None:
        try:
            file = place.stat(name)
        except StoreError:
            raise
        except PlaceError as error:
            raise ConversionError(str(error)) from None
        if file is None:
            raise ConversionError(f"{place / name}: cannot be read (there is no such file)")
        self.place = place
        self.path = place / name
        self.name = name
        self.size = file.size
        self.tag = file.tag
        self._file = file
        # Of what a store says the sha256 of, that is compared with.
        self._hash = Hasher(hash_name if file.sha256 is None else "sha256")
        self._hashed = 0
        self._early: dict[int, np.ndarray] = {}
        self._early_bytes = 0
        self._is_local = isinstance(place, LocalPlace)
        self._being_read: set[int] = set()
        self._changed = threading.Condition(threading.RLock())

    def read(
        self, offset: int, num_bytes: int, out: UInt8[np.ndarray, " bytes"] | None = None
    ) -> UInt8[np.ndarray, " bytes"]:
        """`num_bytes` bytes from `offset` as uint8 `[num_bytes]`: in `out`, if that is given.

        Raises: StoreError when the file ends before.
        """
        buffer = np.empty(num_bytes, np.uint8) if out is None else out
        if num_bytes:
            self.place.read_into(self._file, offset, memoryview(buffer))
        return buffer

    def read_hashed(
        self, offset: int, num_bytes: int, out: UInt8[np.ndarray, " bytes"] | None = None
    ) -> UInt8[np.ndarray, " bytes"]:
        """`read`, adding the bytes to the file's hash."""
        with self._changed:
            self._being_read.add(offset)
        try:
            data = self.read(offset, num_bytes, out)
            with self._changed:
                # What comes too early would have to be copied. On a disk, those who read what is before are done soon.
                while out is not None and self._is_local and min(self._being_read, default=offset) < offset:
                    self._changed.wait()
                self._hash_in_order(offset, data, is_lent=out is not None)
        finally:
            with self._changed:
                self._being_read.discard(offset)
                self._changed.notify_all()
        return data

    def hash(self) -> str:
        """The hash of the whole file, with its name in front; reads what `read_hashed` has not.

        Raises: StoreError when the store itself says that it is another.
        """
        with self._changed:
            self._add_early()
            while self._hashed < self.size:
                end = min(self._early, default=self.size)
                self._add(self.read(self._hashed, min(_GAP_BLOCK_BYTES, end - self._hashed)))
                self._add_early()
            value = self._hash.value()
        if self._file.sha256 is not None and value != f"sha256:{self._file.sha256}":
            raise StoreError(f"{self.path}: {value}, the store says {self._file.sha256}. Try again")
        return value

    def _hash_in_order(self, offset: int, data: UInt8[np.ndarray, " bytes"], *, is_lent: bool) -> None:
        if offset + len(data) > self._hashed and offset not in self._early:
            # What must wait for the bytes before it may not lie where the caller puts others soon.
            self._early[offset] = data.copy() if is_lent and offset > self._hashed else data
            self._early_bytes += len(data)
        self._add_early()
        while self._early_bytes > _MAX_EARLY_BYTES:
            first = min(self._early)
            if first - self._hashed <= _SMALL_GAP_BYTES:
                self._add(self.read(self._hashed, first - self._hashed))
                self._add_early()
            else:
                self._early_bytes -= len(self._early.pop(max(self._early)))

    def _add_early(self) -> None:
        """Adds what waited for the next byte, from that byte on."""
        while self._early and (first := min(self._early)) <= self._hashed:
            data = self._early.pop(first)
            self._early_bytes -= len(data)
            if first + len(data) > self._hashed:
                self._add(data[self._hashed - first :])

    def _add(self, data: UInt8[np.ndarray, " bytes"]) -> None:
        self._hash.update(memoryview(data))
        self._hashed += len(data)


@dataclass(frozen=True)
class SourceTensor:
    """One stored tensor: `num_bytes` at `offset` of `file`, `[rows, …]` in C order.

    `dtype` is a name of safetensors or a GGML block type. `heads` is not None for the q and k projections of a GGUF,
    whose rows are interleaved per head and put back on reading.
    """

    name: str
    file: SourceFile
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    heads: int | None = None

    @property
    def is_readable(self) -> bool:
        """Whether it can be a parameter by itself."""
        return self.dtype in FLOATS or self.dtype in BLOCK_TYPES

    @property
    def row_multiple(self) -> int:
        """Slices start and end at multiples of this many rows."""
        return 1 if self.heads is None else self.shape[0] // self.heads

    def lies_as(self, dtype: np.dtype) -> bool:
        """Whether the file's bytes are the rows in `dtype`, so that they can be read to where they are needed."""
        is_plain = type(self).read_rows is SourceTensor.read_rows and self.heads is None
        return is_plain and FLOATS.get(self.dtype) == dtype

    def part(self, start: int, stop: int) -> SourceTensor:
        """Rows `[start, stop)` as a tensor of their own."""
        row_bytes = self.num_bytes // self.shape[0]
        return replace(
            self,
            offset=self.offset + start * row_bytes,
            num_bytes=(stop - start) * row_bytes,
            shape=(stop - start, *self.shape[1:]),
        )

    def read_bytes(
        self, start: int, stop: int, out: UInt8[np.ndarray, " bytes"] | None = None, *, hashed: bool = True
    ) -> UInt8[np.ndarray, " bytes"]:
        """Rows `[start, stop)` as they lie in the file, uint8 `[num_bytes]`: in `out`, if that is given."""
        row_bytes = self.num_bytes // self.shape[0]
        read = self.file.read_hashed if hashed else self.file.read
        return read(self.offset + start * row_bytes, (stop - start) * row_bytes, out)

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """Rows `[start, stop)` as they are stored; block types are dequantised to float32.

        `hashed`: they are added to the file's hash, best in the order of the file.
        """
        data = self.read_bytes(start, stop, hashed=hashed)
        shape = (stop - start, *self.shape[1:])
        if (dtype := (FLOATS | _PARTS).get(self.dtype)) is not None:
            rows = data.view(dtype).reshape(shape)
        else:
            rows = _dequantize(data.reshape(stop - start, -1), self.dtype).reshape(shape)
        return rows if self.heads is None else _undo_permutation(rows, self.row_multiple)


@dataclass(frozen=True)
class Source:
    """An opened source checkpoint.

    `config` is Hugging Face's config.json as a dict; `sidecars` are the files that go into the checkpoint beside the
    weights, by name; `warnings` are told to the user. `check`, once all tensors are read, raises CheckpointError for
    bytes that are other than the source itself says.
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: tuple[SourceFile, ...]
    sidecars: Mapping[str, bytes]
    warnings: tuple[str, ...] = field(default=())
    check: Callable[[], None] = field(default=lambda: None)

    def close(self) -> None:
        """Ends connections and closes every file."""
        for file in self.files:
            file.place.close()


def _dequantize(rows: UInt8[np.ndarray, "rows bytes"], dtype: str) -> Float32[np.ndarray, "rows width"]:
    import gguf

    return gguf.dequantize(rows, gguf.GGMLQuantizationType[dtype])


def _undo_permutation(rows: Shaped[np.ndarray, "rows ..."], head_dim: int) -> Shaped[np.ndarray, "rows ..."]:
    """Puts each head's rows from llama.cpp's interleaved rotary order into Hugging Face's half-split order."""
    split = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
