"""Copies tensors from a source to a checkpoint, in the order of the source's files, each byte read once.

Many pieces at a time are read, converted, hashed and written, in a bounded number of bytes that are used again and
again. A piece is some chunks of an array; of a matrix that is cut by columns, all of it.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxllama.model.params import ParamSpec, stored_specs
from jaxllama.system.buffers import Buffers, page_aligned
from jaxllama.weights.arrays.files import FileRecord
from jaxllama.weights.arrays.writer import ParamsWriter
from jaxllama.weights.sources.source import SourceTensor
from jaxllama.weights.sources.stored import Pairs, Storage, read_rounded, read_stored

type Pair = tuple[ParamSpec, SourceTensor]
type Copied = list[tuple[Pair, Mapping[str, FileRecord]]]
"""Tensors with their files."""

# What is read at a time, as it will be stored: the temporary copies of a conversion are a few times as large.
SLICE_BYTES = 4 * 2**20
# Smaller chunks are read several at a time.
_PIECE_BYTES = 4 * 2**20


@dataclass
class _Tensor:
    """A tensor on its way. `scale` is the whole of it, which is written last."""

    pair: Pair
    parts: list[ParamSpec]
    num_left: int
    scale: np.ndarray | None
    begun: list[Future[dict[str, FileRecord]]] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)


@dataclass
class _Piece:
    """Rows of a tensor; `memory` is there while they are on their way.

    `num_left` counts the slices that are not read, then the files that are not written.
    """

    tensor: _Tensor
    start: int
    stop: int
    num_bytes: int
    num_left: int = 0
    memory: np.ndarray | None = None


class _Scratch(threading.local):
    """A thread's memory for one file, used again for the next."""

    memory: np.ndarray | None = None

    def take(self, num_bytes: int) -> np.ndarray:
        """uint8 `[num_bytes]`, from the start of a page."""
        if self.memory is None or len(self.memory) < num_bytes:
            self.memory = page_aligned(num_bytes)
        return self.memory[:num_bytes]


class Copier:
    """Copies tensors. At most `max_in_flight_bytes` of pieces are being read or written, unless it is one alone.

    `num_readers` slices of a few MB are read, and `num_writers` files written, at a time.
    """

    def __init__(
        self, writer: ParamsWriter, storage: Storage, *, num_readers: int, num_writers: int, max_in_flight_bytes: int
    ) -> None:
        self._writer = writer
        self._storage = storage
        self._max_bytes = max_in_flight_bytes
        self._buffers = Buffers(0)
        self._scratch = _Scratch()
        self._readers = ThreadPoolExecutor(num_readers, "jaxllama-read")
        self._writers = ThreadPoolExecutor(num_writers, "jaxllama-write")
        self._changed = threading.Condition()
        self._num_in_flight = 0
        self._done: list[_Tensor] = []
        self._error: BaseException | None = None

    def copy(self, pairs: Pairs) -> Iterator[Copied]:
        """The tensors whose files are all written, as many as there are at a time.

        Raises: ConversionError for a value that is not finite or that the dtype cannot hold; OSError, StoreError.
        """
        num_left = len(pairs)
        # Of what is never touched nothing is there, but some systems refuse to promise it.
        self._buffers = Buffers(min(self._max_bytes, 2 * self._storage.num_bytes(pairs)))
        try:
            for pair in sorted(pairs, key=lambda pair: (pair[1].file.name, pair[1].offset)):
                for piece in self._pieces(pair):
                    for done in self._wait(functools.partial(self._make_room, piece)):
                        num_left -= len(done)
                        yield done
                    self._start(piece)
            while num_left:
                for done in self._wait(lambda: bool(self._done)):
                    num_left -= len(done)
                    yield done
        finally:
            self._fail(GeneratorExit())
            self._readers.shutdown(cancel_futures=True)
            self._writers.shutdown(cancel_futures=True)

    def _wait(self, is_met: Callable[[], bool]) -> Iterator[Copied]:
        """The tensors that are finished until the condition is met, and then."""
        met = False
        while not met:
            with self._changed:
                self._changed.wait_for(lambda: is_met() or self._done or self._error)
                if self._error:
                    raise self._error
                met = is_met()
                done, self._done = self._done, []
            if done:
                yield [(tensor.pair, tensor.files) for tensor in done]

    def _make_room(self, piece: _Piece) -> bool:
        if piece.memory is None:
            piece.memory = self._buffers.take(piece.num_bytes)
            if piece.memory is None and not self._num_in_flight:
                piece.memory = np.empty(piece.num_bytes, np.uint8)
            self._num_in_flight += piece.memory is not None
        return piece.memory is not None

    def _pieces(self, pair: Pair) -> list[_Piece]:
        spec, source = pair
        parts = stored_specs(spec, self._storage.quantize)
        chunk, num_rows = self._writer.chunk_of(parts[0]), spec.shape[0]
        row_bytes = math.prod(spec.shape[1:]) * self._dtype_of(parts[0]).itemsize
        if chunk[1:] != spec.shape[1:]:
            step = num_rows
        else:
            unit = math.lcm(chunk[0], source.row_multiple)
            step = min(num_rows, unit * max(1, _PIECE_BYTES // (unit * row_bytes)))
        scale = np.empty(num_rows, np.float32) if len(parts) > 1 else None
        tensor = _Tensor(pair, list(parts), math.ceil(num_rows / step), scale)
        return [
            _Piece(tensor, start, min(start + step, num_rows), row_bytes * min(step, num_rows - start))
            for start in range(0, num_rows, step)
        ]

    def _dtype_of(self, part: ParamSpec) -> np.dtype:
        return np.dtype(part.dtype or self._storage.numpy_dtype)

    def _start(self, piece: _Piece) -> None:
        tensor, source = piece.tensor, piece.tensor.pair[1]
        if not tensor.begun:
            # In the queue before any of their files, so that no writer waits for what no writer will do.
            tensor.begun = [self._writers.submit(self._writer.begin, part) for part in tensor.parts]
        num_rows = piece.stop - piece.start
        rows = SLICE_BYTES * num_rows // max(1, piece.num_bytes * source.row_multiple) * source.row_multiple
        cuts = range(piece.start, piece.stop, max(source.row_multiple, rows))
        piece.num_left = len(cuts)
        for start in cuts:
            self._run(self._readers, self._read, piece, start, min(start + cuts.step, piece.stop))

    def _run(self, pool: ThreadPoolExecutor, work: Callable[..., None], *args: Any) -> None:
        def run() -> None:
            try:
                if not self._error:
                    work(*args)
            except BaseException as error:
                self._fail(error)

        try:
            pool.submit(run)
        except RuntimeError:
            if not self._error:
                raise

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _values(self, piece: _Piece) -> np.ndarray:
        """The piece's rows as they are stored, without scales."""
        assert piece.memory is not None
        part = piece.tensor.parts[0]
        return piece.memory.view(self._dtype_of(part)).reshape(piece.stop - piece.start, *part.shape[1:])

    def _read(self, piece: _Piece, start: int, stop: int) -> None:
        source, dtype = piece.tensor.pair[1], self._storage.numpy_dtype
        out = self._values(piece)[start - piece.start : stop - piece.start]
        if piece.tensor.scale is None:
            rows = read_stored(source, start, stop, dtype, hashed=True, out=out)
        else:
            rows, piece.tensor.scale[start:stop] = read_rounded(source, start, stop, dtype, hashed=True)
        if rows is not out:
            out[...] = rows
        with self._changed:
            piece.num_left -= 1
            is_read = not piece.num_left
        if is_read:
            values = self._values(piece)
            first = (piece.start, *(0 for _ in values.shape[1:]))
            files = list(self._writer.files_of(piece.tensor.parts[0], values, first))
            piece.num_left = len(files)
            for name, block in files:
                self._run(self._writers, self._write, piece, name, block)

    def _write(self, piece: _Piece, name: str, block: Shaped[np.ndarray, " ..."]) -> None:
        tensor = piece.tensor
        begun = [future.result() for future in tensor.begun]
        record = self._writer.write_block(tensor.parts[0], name, block, self._scratch.take)
        with self._changed:
            tensor.files[name] = record
            piece.num_left -= 1
            if piece.num_left:
                return
            assert piece.memory is not None
            self._buffers.give_back(piece.memory)
            piece.memory = None
            self._num_in_flight -= 1
            tensor.num_left -= 1
            is_last = not tensor.num_left
            self._changed.notify_all()
        if is_last:
            for records in begun:
                tensor.files |= records
            if tensor.scale is not None:
                tensor.files |= self._writer.write_piece(tensor.parts[1], tensor.scale, (0,))
            with self._changed:
                self._done.append(tensor)
                self._changed.notify_all()
