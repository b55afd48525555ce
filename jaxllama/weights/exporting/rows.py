"""Where an export's numbers come from: a checkpoint (or a source that is not converted), or the devices of a mesh."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxllama.errors import CheckpointError, one_line
from jaxllama.hosts.group import Group
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params, ParamSpec, param_specs, stored_specs
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.forms import get_whole

_ROWS = "rows"
"""What a group's process 0 asks the others about."""

type _Piece = tuple[tuple[int, ...], np.ndarray]


class Rows(Protocol):
    """Arrays by rows. `dtype` is that of what is not int8, `quantize` how matrices are kept.

    `num_readers` blocks at a time are read fast.
    """

    dtype: str
    quantize: str | None
    num_readers: int

    def prepare(self, parts: Iterable[ParamSpec], pool: Executor) -> None:
        """Must be called before anything else, with all the arrays that will be read. Raises: CheckpointError."""

    def row_multiple(self, part: ParamSpec) -> int:
        """Rows are read from and to multiples of this."""

    def read(self, part: ParamSpec, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of an array as they are. Raises: CheckpointError, ConversionError or StoreError."""


class StoredRows:
    """The arrays of a checkpoint, wherever it is; of a source, as `convert` would store them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.dtype = checkpoint.dtype
        self.quantize = checkpoint.reader.quantize
        self.num_readers = checkpoint.reader.num_readers
        self._reader = checkpoint.reader

    def prepare(self, parts: Iterable[ParamSpec], pool: Executor) -> None:
        self._reader.prepare(parts, pool)

    def row_multiple(self, part: ParamSpec) -> int:
        return self._reader.row_multiple(part)

    def read(self, part: ParamSpec, start: int, stop: int) -> np.ndarray:
        width = part.shape[1] if len(part.shape) > 1 else 1
        return self._reader.read(part, slice(start, stop), slice(0, width), None)


class DeviceRows:
    """The arrays on a mesh, of which one at a time is copied to the host.

    Of a group, process 0 has its own rows and asks the others for theirs.
    """

    num_readers = 1

    def __init__(self, params: Params, group: Group | None = None) -> None:
        self.dtype: str = params["norm"].dtype.name
        self.quantize = _quantize(params)
        self._held = _Held(params)
        self._group = group

    def prepare(self, parts: Iterable[ParamSpec], pool: Executor) -> None:
        """They are there."""

    def row_multiple(self, part: ParamSpec) -> int:
        return 1

    def read(self, part: ParamSpec, start: int, stop: int) -> np.ndarray:
        pieces = self._held.read(part, start, stop) + self._ask(part.name, start, stop)
        shape = (stop - start, *part.shape[1:])
        if len(pieces) == 1 and pieces[0][1].shape == shape:
            return pieces[0][1]
        rows = np.empty(shape, pieces[0][1].dtype)
        for first, piece in pieces:
            begins = (first[0] - start, *first[1:])
            rows[tuple(slice(i, i + n) for i, n in zip(begins, piece.shape, strict=True))] = piece
        return rows

    def close(self) -> None:
        """Gives the host's memory back, that of the other processes too. Raises: LockstepError."""
        self._held.forget()
        self._ask("", 0, 0)

    def _ask(self, name: str, start: int, stop: int) -> list[_Piece]:
        question = json.dumps([name, start, stop]).encode()
        answers = [] if self._group is None else self._group.ask(_ROWS, question)
        return [piece for i, answer in enumerate(answers, 1) for piece in _pieces_of(answer, i)]


def answer_rows(config: LlamaConfig, params: Params, group: Group) -> None:
    """What every process but 0 does: gives what its devices hold of some rows whenever process 0 asks for them."""
    parts = {part.name: part for spec in param_specs(config) for part in stored_specs(spec, _quantize(params))}
    held = _Held(params)

    def answer(question: bytes) -> bytes:
        try:
            name, start, stop = json.loads(question)
            if not name:
                held.forget()
            pieces = held.read(parts[name], start, stop) if name else []
        except Exception as error:
            return _to_bytes({"error": f"{type(error).__name__}: {one_line(error)}"}, [])
        head = [[first, piece.shape, piece.dtype.name] for first, piece in pieces]
        return _to_bytes({"pieces": head}, [piece for _, piece in pieces])

    group.answer_with(_ROWS, answer)


class _Held:
    """What this process's devices hold, the first of the copies of each shard: all processes together, all of it."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._copied: tuple[str, list[_Piece]] = "", []

    def read(self, part: ParamSpec, start: int, stop: int) -> list[_Piece]:
        """What there is of the rows `[start, stop)`: each piece with where in the array it begins."""
        if self._copied[0] != part.name:
            self.forget()  # before the next one's memory is taken
            self._copied = part.name, _to_host(get_whole(self._params, part))
        found = []
        for first, piece in self._copied[1]:
            low, high = max(start, first[0]), min(stop, first[0] + len(piece))
            if low < high:
                found.append(((low, *first[1:]), piece[low - first[0] : high - first[0]]))
        return found

    def forget(self) -> None:
        """Gives the memory of the last array back."""
        self._copied = "", []


def _to_host(array: Shaped[jax.Array, " ..."]) -> list[_Piece]:
    pieces = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            # A view of its own: JAX keeps the host's copy for as long as the array that was asked for it.
            view = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
            pieces.append((tuple(place.start or 0 for place in shard.index), np.asarray(view)))
    return pieces


def _quantize(params: Params) -> str | None:
    # An array has no scale; int8 matrices have one, packed or not.
    return "int8" if getattr(params["embed_tokens"], "scale", None) is not None else None


def _to_bytes(head: Mapping[str, Any], pieces: list[Shaped[np.ndarray, " ..."]]) -> bytes:
    text = json.dumps(head).encode()
    return b"".join([len(text).to_bytes(4, "little"), text, *(piece.tobytes() for piece in pieces)])


def _pieces_of(data: bytes, process_id: int) -> list[_Piece]:
    start = 4 + int.from_bytes(data[:4], "little")
    head, pieces = json.loads(data[4:start]), []
    if "error" in head:
        raise CheckpointError(f"process {process_id} cannot give its weights ({head['error']})")
    for first, shape, name in head["pieces"]:
        dtype = jnp.dtype(name)
        piece = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        pieces.append((tuple(first), piece))
        start += piece.nbytes
    return pieces
