"""Where an export's numbers come from: a checkpoint (or a source that is not converted), or the devices of a mesh."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllama.errors import CheckpointError
from jaxllama.model.params import Params, ParamSpec
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.forms import get_whole


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
    """The arrays on a mesh, of which one at a time is copied to the host."""

    num_readers = 1

    def __init__(self, params: Params) -> None:
        self.dtype: str = params["norm"].dtype.name
        # An array has no scale; int8 matrices have one, packed or not.
        self.quantize = "int8" if getattr(params["embed_tokens"], "scale", None) is not None else None
        self._params = params
        self._copied: tuple[str, np.ndarray] | None = None

    def prepare(self, parts: Iterable[ParamSpec], pool: Executor) -> None:
        """They are there. Raises: CheckpointError if some are on devices of other processes."""
        if not self._params["norm"].sharding.is_fully_addressable:
            raise CheckpointError("this model is spread over several processes: save it, and export the checkpoint")

    def row_multiple(self, part: ParamSpec) -> int:
        return 1

    def read(self, part: ParamSpec, start: int, stop: int) -> np.ndarray:
        copied = self._copied
        if copied is None or copied[0] != part.name:
            copied = self._copied = part.name, _to_host(get_whole(self._params, part))
        return copied[1][start:stop]


def _to_host(array: jax.Array) -> np.ndarray:
    whole: np.ndarray | None = None
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            # A view of its own: JAX keeps the host's copy for as long as the array that was asked for it.
            view = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
            if shard.data.shape == array.shape:
                return np.asarray(view)
            whole = np.empty(array.shape, jnp.dtype(array.dtype)) if whole is None else whole
            whole[shard.index] = np.asarray(view)
    assert whole is not None
    return whole
