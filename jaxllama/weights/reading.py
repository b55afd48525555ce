"""Where a loader's numbers come from: the arrays of a checkpoint, or the tensors of a source that is not converted.

Both give blocks, some rows and some columns of an array, as they are or would be stored. Threads read many at a time.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from jaxllama.errors import CheckpointError, PlaceError, StoreError, listed
from jaxllama.model.params import ParamSpec, QuantizedWeight, stored_specs
from jaxllama.weights.arrays.files import PARAMS, FileRecord
from jaxllama.weights.places import Place
from jaxllama.weights.sources.quantized.interface import Int8Tensor
from jaxllama.weights.sources.source import SourceFile, SourceTensor
from jaxllama.weights.sources.stored import Storage, num_non_finite, read_rounded, read_stored, round_rows


class Reader(Protocol):
    """Reads blocks of arrays. `quantize` is how matrices are stored; `num_readers` blocks at a time are read fast."""

    quantize: str | None
    num_readers: int

    def prepare(self, parts: Iterable[ParamSpec], pool: Executor) -> None:
        """Must be called before anything else, with all the arrays that will be read. Raises: CheckpointError."""

    def order(self, part: ParamSpec) -> Any:
        """Arrays are read fastest in the order of this."""

    def dtype(self, part: ParamSpec) -> np.dtype:
        """That the array has as it is stored."""

    def row_multiple(self, part: ParamSpec) -> int:
        """Blocks start and end at multiples of this many rows."""

    def num_columns(self, part: ParamSpec) -> int:
        """How many columns can be read without the others, all of them if none can."""

    def read(
        self, part: ParamSpec, rows: slice, columns: slice, out: Shaped[np.ndarray, " ..."] | None
    ) -> Shaped[np.ndarray, " ..."]:
        """The block, `[rows, columns]` or `[rows]`: in `out`, contiguous and of the right dtype, if that is given and
        the reader can.

        Raises: CheckpointError, ConversionError or StoreError, saying what is wrong with which file.
        """

    def read_rounded(self, spec: ParamSpec, rows: slice) -> QuantizedWeight:
        """Whole rows of a matrix that is not stored as int8, rounded. Raises: as `read`."""

    def close(self) -> None:
        """Ends connections and closes files; a later read opens them again."""


@dataclass(frozen=True)
class _Stored:
    """A zarr array as it lies: what its `.zarray` says."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype


class CheckpointReader:
    """The zarr arrays of a checkpoint, read by the ranges of their chunks."""

    def __init__(self, place: Place, files: Mapping[str, Any], quantize: str | None) -> None:
        self.quantize = quantize
        self.num_readers = place.num_readers
        self._place = place
        self._files = files
        self._arrays: dict[str, _Stored] = {}

    def prepare(self, parts: Iterable[ParamSpec], pool: Executor) -> None:
        parts = list(parts)
        for part, stored in zip(parts, pool.map(self._open, parts), strict=True):
            self._arrays[part.name] = stored

    def order(self, part: ParamSpec) -> Any:
        return 0

    def dtype(self, part: ParamSpec) -> np.dtype:
        return self._arrays[part.name].dtype

    def row_multiple(self, part: ParamSpec) -> int:
        return 1

    def num_columns(self, part: ParamSpec) -> int:
        chunk = self._arrays[part.name].chunk
        return chunk[1] if len(chunk) > 1 else 1

    def read(
        self, part: ParamSpec, rows: slice, columns: slice, out: Shaped[np.ndarray, " ..."] | None
    ) -> Shaped[np.ndarray, " ..."]:
        stored = self._arrays[part.name]
        shape = (rows.stop - rows.start, *([columns.stop - columns.start] if len(stored.shape) > 1 else []))
        out = np.empty(shape, stored.dtype) if out is None else out
        height, width = stored.chunk[0], self.num_columns(part)
        for row in range(rows.start // height, math.ceil(rows.stop / height)):
            first, last = max(rows.start, row * height), min(rows.stop, (row + 1) * height)
            target = out[first - rows.start : last - rows.start]
            if len(stored.shape) == 1:
                self._read_rows(part, f"{row}", first - row * height, target, 1)
                continue
            for column in range(columns.start // width, math.ceil(columns.stop / width)):
                left, right = max(columns.start, column * width), min(columns.stop, (column + 1) * width)
                piece = target[:, left - columns.start : right - columns.start]
                name, start = f"{row}.{column}", first - row * height
                if right - left == width and piece.flags.c_contiguous:
                    self._read_rows(part, name, start, piece, width)
                else:
                    whole = np.empty((last - first, width), stored.dtype)
                    self._read_rows(part, name, start, whole, width)
                    piece[...] = whole[:, left - column * width : right - column * width]
        return out

    def read_rounded(self, spec: ParamSpec, rows: slice) -> QuantizedWeight:
        array = self.read(spec, rows, slice(0, spec.shape[1]), None)
        if num_non_finite(array):
            raise CheckpointError(f"{self._place}: {spec.name} has NaN or infinite values")
        return round_rows(array)

    def close(self) -> None:
        self._place.close()

    def _read_rows(self, part: ParamSpec, chunk: str, start: int, out: Shaped[np.ndarray, " ..."], width: int) -> None:
        """Whole rows of a chunk, from its row `start`."""
        self._read_into(f"{PARAMS}/{part.name}/{chunk}", start * width * out.itemsize, out.reshape(-1).view(np.uint8))

    def _read_into(self, name: str, offset: int, out: UInt8[np.ndarray, " bytes"]) -> None:
        file = self._place.stat(name)
        if file is None:
            raise CheckpointError(f"{self._place / name}: missing. Convert the model again")
        self._place.read_into(file, offset, memoryview(out))

    def _open(self, part: ParamSpec) -> _Stored:
        name = f"{PARAMS}/{part.name}/.zarray"
        if name not in self._files:
            raise CheckpointError(
                f"{self._place}: tensor {part.name} is not in the checkpoint. Is config.json of this model?"
            )
        where = self._place / name
        try:
            value = json.loads(self._place.read(name) or b"")
            stored = _Stored(tuple(value["shape"]), tuple(value["chunks"]), jnp.dtype(value["dtype"]))
            is_plain = (value["compressor"], value["filters"], value["order"]) == (None, None, "C")
            is_plain = is_plain and value["dimension_separator"] == "." and value["zarr_format"] == 2
            is_plain = is_plain and all(type(n) is int and n > 0 for n in (*stored.chunk, *stored.shape))
        except StoreError:
            raise
        except (PlaceError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{where}: cannot be read ({error})") from None
        if stored.shape != part.shape:
            raise CheckpointError(
                f"{self._place / PARAMS}/{part.name}: shape {stored.shape}, expected {part.shape}. "
                "Is config.json of this model?"
            )
        if not is_plain or len(stored.chunk) != len(part.shape) or any(stored.chunk[2:]):
            raise CheckpointError(f"{where}: not an array as jaxllama writes them. Convert the model again")
        return stored


class CheckedReader(CheckpointReader):
    """The arrays of a checkpoint, hashed as they are read, each byte once."""

    def __init__(self, place: Place, files: Mapping[str, FileRecord], quantize: str | None) -> None:
        super().__init__(place, files, quantize)
        self._hashed: dict[str, SourceFile] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Compares the hashes of all files of arrays with the manifest's; reads what has not been read.

        Raises: CheckpointError listing those that differ; StoreError.
        """
        problems = []
        for name in sorted(name for name in self._files if name.startswith(f"{PARAMS}/")):
            got, want = self._file(name).hash(), self._files[name].hash
            if got != want:
                problems.append(f"{name}: {got[:19]}…, expected {want[:19]}…")
        if problems:
            raise CheckpointError(f"{self._place}: {len(problems)} damaged file(s): {listed(problems)}")

    def _file(self, name: str) -> SourceFile:
        with self._lock:
            if name not in self._hashed:
                self._hashed[name] = SourceFile(self._place, name, self._files[name].hash.partition(":")[0])
            return self._hashed[name]

    def _read_into(self, name: str, offset: int, out: UInt8[np.ndarray, " bytes"]) -> None:
        self._file(name).read_hashed(offset, len(out), out)


@dataclass(frozen=True, kw_only=True)
class ArrayTensor(SourceTensor):
    """An array of a checkpoint as a tensor of a source, for what is merged into it. `arrays` must be prepared."""

    arrays: CheckpointReader
    array: ParamSpec

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """As stored; there is no file to hash."""
        width = self.shape[1] if len(self.shape) > 1 else 1
        rows: np.ndarray = self.arrays.read(self.array, slice(start, stop), slice(0, width), None)
        return rows


@dataclass(frozen=True, kw_only=True)
class Int8ArrayTensor(Int8Tensor):
    """An int8 matrix of a checkpoint: its values and scales."""

    arrays: CheckpointReader
    values: ParamSpec
    scale: ParamSpec

    def read_int8_rows(self, start: int, stop: int, *, hashed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """As stored; there is no file to hash."""
        rows = slice(start, stop)
        values = self.arrays.read(self.values, rows, slice(0, self.shape[1]), None)
        return values, self.arrays.read(self.scale, rows, slice(0, 1), None)

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """Float32: the values times their scales."""
        values, scale = self.read_int8_rows(start, stop)
        rows: np.ndarray = values.astype(np.float32) * scale[:, None]
        return rows


def array_tensor(place: Place, arrays: CheckpointReader, spec: ParamSpec, dtype: str) -> SourceTensor:
    """The tensor that `spec` describes, of a checkpoint of `dtype` at `place`."""
    parts = stored_specs(spec, arrays.quantize)
    file = SourceFile(place, f"{PARAMS}/{parts[0].name}/.zarray")
    name = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    if len(parts) == 1:
        return ArrayTensor(spec.hf_name, file, 0, 0, spec.shape, name, arrays=arrays, array=spec)
    return Int8ArrayTensor(
        name=spec.hf_name,
        file=file,
        offset=0,
        num_bytes=0,
        shape=spec.shape,
        dtype="int8",
        arrays=arrays,
        values=parts[0],
        scale=parts[1],
    )


class SourceReader:
    """The tensors of a source, as the converter would store them."""

    def __init__(
        self, tensors: Mapping[tuple[str, tuple[int, int] | None], SourceTensor], storage: Storage, num_readers: int
    ) -> None:
        self.quantize: str | None = None
        self.num_readers = num_readers
        self._tensors = tensors
        self._storage = storage

    def prepare(self, parts: Iterable[ParamSpec], pool: Executor) -> None:
        """Everything was checked when the source was opened."""

    def order(self, part: ParamSpec) -> Any:
        tensor = self._tensors[part.hf_key]
        return tensor.file.name, tensor.offset

    def dtype(self, part: ParamSpec) -> np.dtype:
        return self._storage.numpy_dtype

    def row_multiple(self, part: ParamSpec) -> int:
        return self._tensors[part.hf_key].row_multiple

    def num_columns(self, part: ParamSpec) -> int:
        return part.shape[1] if len(part.shape) > 1 else 1

    def read(
        self, part: ParamSpec, rows: slice, columns: slice, out: Shaped[np.ndarray, " ..."] | None
    ) -> Shaped[np.ndarray, " ..."]:
        is_whole = len(part.shape) == 1 or columns == slice(0, part.shape[1])
        tensor, dtype = self._tensors[part.hf_key], self._storage.numpy_dtype
        array = read_stored(tensor, rows.start, rows.stop, dtype, out=out if is_whole else None)
        return array if is_whole else array[:, columns]

    def read_rounded(self, spec: ParamSpec, rows: slice) -> QuantizedWeight:
        return read_rounded(self._tensors[spec.hf_key], rows.start, rows.stop, self._storage.numpy_dtype)

    def close(self) -> None:
        for place in {tensor.file.place for tensor in self._tensors.values()}:
            place.close()
