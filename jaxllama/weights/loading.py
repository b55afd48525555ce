"""From a checkpoint, or a source that is not converted, to weights on a mesh, rounded to int8 on the way if asked.

Tensors are read in blocks, many at a time, into the hosts' copies of this process's shards, which become arrays on the
devices: on CPUs the copies themselves. What lies between a store and the devices is bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Shaped

from jaxllama.errors import ConfigError
from jaxllama.model.mesh import param_shardings
from jaxllama.model.params import (
    QUANTIZATIONS,
    Params,
    ParamSpec,
    QuantizedWeight,
    build_params,
    get_param,
    param_specs,
    stored_specs,
)
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.system.progress import OnBytes, show_bytes
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.forms import fit, pack
from jaxllama.weights.reading import Reader

MAX_IN_FLIGHT_BYTES = 2 * 2**30
"""What a load holds in the host's memory at most, beside the weights of CPU devices."""

_BLOCK_BYTES = 8 * 2**20
# What takes longer shows a bar.
_PATIENCE_S = 2.0
# A matrix to be packed for a CPU is there twice for a while: few at a time.
_MAX_UNPACKED_BYTES = 64 * 2**20
# Devices take a host's memory as it is only from such addresses.
_ALIGNMENT_BYTES = 64


def load_params(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: Any,
    quantize: str | None = None,
    *,
    max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
    progress: bool | None = None,
) -> Params:
    """The weights, sharded by the rules, in `dtype` and in the form that suits the devices.

    Matrices are int8 if they are stored so or `quantize` is "int8". Rounded is what is stored, whatever `dtype`: the
    bits of `convert` with the same option. Each process reads what its devices need. `progress` as in
    `system.progress.show_bytes`.

    Raises: CheckpointError, ConversionError or StoreError saying what is wrong with which file, or when a matrix to be
    rounded has NaN or infinity; ConfigError.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantize must be 'int8' or None, got {quantize!r}")
    if max_in_flight_bytes < _BLOCK_BYTES:
        raise ConfigError(f"max_in_flight_bytes must be at least {_BLOCK_BYTES:,}, got {max_in_flight_bytes:,}")
    quantize = quantize or checkpoint.manifest.quantize
    platform = describe_platform(checkpoint.config, mesh, dtype=dtype)
    shardings = param_shardings(checkpoint.config, mesh, quantize)
    with show_bytes("load", show=progress, after_s=_PATIENCE_S) as on_bytes:
        options: dict[str, Any] = {"packs": platform.packs_weights, "on_bytes": on_bytes}
        params = _read(checkpoint, dtype, shardings, quantize, max_in_flight_bytes, **options)
    return fit(params, platform)


def restore_params(
    checkpoint: Checkpoint, dtype: Any, shardings: Params, only: Collection[ParamSpec] | None = None
) -> Params:
    """The weights as they are stored, each device's own shard, cast to `dtype` (None: as stored; int8 stays int8).

    `shardings` has the structure of the tree that is stored, with a `jax.sharding.Sharding` at every leaf. With `only`
    nothing else is read, and `...` stands in its place.

    Raises: CheckpointError when the stored tensors cannot be read or do not fit the config.
    """
    return _read(checkpoint, dtype, shardings, checkpoint.manifest.quantize, MAX_IN_FLIGHT_BYTES, only=only)


def _read(
    checkpoint: Checkpoint,
    dtype: Any,
    shardings: Params,
    quantize: str | None,
    max_in_flight_bytes: int,
    *,
    only: Collection[ParamSpec] | None = None,
    packs: bool = False,
    on_bytes: OnBytes = lambda done, total, at_work: None,
) -> Params:
    reader = checkpoint.reader
    specs = [spec for spec in param_specs(checkpoint.config) if only is None or spec in only]
    vectors = [spec for spec in specs if len(spec.shape) == 1]
    matrices = [spec for spec in specs if len(spec.shape) > 1]
    leaves: dict[tuple[str | int, ...], Any] = {}
    readers = ThreadPoolExecutor(reader.num_readers, "jaxllama-read")
    with contextlib.closing(reader), readers as pool, _cancelling(pool):
        reader.prepare([part for spec in specs for part in stored_specs(spec, reader.quantize)], pool)
        loader = _Loader(reader, pool, dtype, max_in_flight_bytes)
        sizes = {spec.name: _stored_bytes(spec, reader) for spec in specs}
        done, total = 0, sum(sizes.values())
        for spec, weight in loader.load(vectors, shardings, quantize):
            leaves[spec.path] = weight
            done += sizes[spec.name]
        # What is packed is there twice for a moment: the largest, which are outside the layers, while there is room.
        matrices.sort(key=lambda spec: (spec.path[0] == "layers", reader.order(spec)))
        for spec, weight in loader.load(matrices, shardings, quantize):
            leaves[spec.path] = pack({"weight": weight, "layers": []})["weight"] if packs else weight
            del weight
            done += sizes[spec.name]
            on_bytes(done, total, spec.name)
    return build_params(checkpoint.config, lambda spec: leaves.pop(spec.path, ...))


def _stored_bytes(spec: ParamSpec, reader: Reader) -> int:
    parts = stored_specs(spec, reader.quantize)
    return sum(math.prod(part.shape) * np.dtype(part.dtype or reader.dtype(part)).itemsize for part in parts)


@contextlib.contextmanager
def _cancelling(pool: ThreadPoolExecutor) -> Iterator[None]:
    """After an error nothing more is read."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@dataclass(frozen=True)
class _Shard:
    """The host's copy of a part of an array that one or more of this process's devices need."""

    start: tuple[int, ...]
    data: np.ndarray
    devices: tuple[Any, ...]

    def put(self, block: Shaped[np.ndarray, " ..."], start: tuple[int, ...]) -> None:
        """Copies what the block has of this shard, cast to its dtype."""
        here, there = [], []
        for mine, size, other, length in zip(self.start, self.data.shape, start, block.shape, strict=True):
            low, high = max(mine, other), min(mine + size, other + length)
            if low >= high:
                return
            here.append(slice(low - mine, high - mine))
            there.append(slice(low - other, high - other))
        with np.errstate(over="ignore"):
            self.data[tuple(here)] = block[tuple(there)]

    def view(self, start: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
        """Where a block belongs, if all of it does and can be read straight into it."""
        first = [other - mine for mine, other in zip(self.start, start, strict=True)]
        places = tuple(slice(i, i + n) for i, n in zip(first, shape, strict=True))
        found = self.data[places] if min(first) >= 0 else self.data[:0]
        return found if found.shape == shape and found.dtype == dtype and found.flags.c_contiguous else None


@dataclass(frozen=True)
class _Array:
    """An array on its way: the host's copies of its shards, how they are spread, and how they shall be."""

    part: ParamSpec
    shards: tuple[_Shard, ...]
    read: Sharding
    wanted: Sharding

    @property
    def num_bytes(self) -> int:
        """Of the host's copies."""
        return sum(shard.data.nbytes for shard in self.shards)

    def to_devices(self) -> jax.Array:
        """The array; on CPU devices it takes the host's copies as they are."""
        arrays = [jax.device_put(shard.data, device) for shard in self.shards for device in shard.devices]
        array = jax.make_array_from_single_device_arrays(self.part.shape, self.read, arrays)
        if self.read is not self.wanted:
            array = jax.jit(lambda x: x, out_shardings=self.wanted)(array)
        return array


class _Loader:
    """Reads tensors and puts them on their devices, a bounded number of bytes at a time."""

    def __init__(self, reader: Reader, pool: ThreadPoolExecutor, dtype: Any, max_in_flight_bytes: int) -> None:
        self._reader = reader
        self._pool = pool
        self._dtype = dtype
        self._max_bytes = max_in_flight_bytes

    def load(self, specs: list[ParamSpec], shardings: Params, quantize: str | None) -> Iterator[tuple[ParamSpec, Any]]:
        """Each tensor, an array or a `QuantizedWeight`, in the order of `specs`: of many hosts all the same."""
        begun: deque[tuple[ParamSpec, list[_Array], list[Future[None]]]] = deque()
        in_flight = 0
        for spec in specs:
            arrays = self._make_room(spec, shardings, quantize)
            num_bytes = sum(array.num_bytes for array in arrays)
            while begun and in_flight + num_bytes > self._limit(arrays):
                in_flight -= sum(array.num_bytes for array in begun[0][1])
                yield self._finish(*begun.popleft())
            begun.append((spec, arrays, [self._pool.submit(job) for job in self._jobs(spec, arrays)]))
            in_flight += num_bytes
            del arrays
        while begun:
            yield self._finish(*begun.popleft())

    def _limit(self, arrays: list[_Array]) -> int:
        devices = (device for array in arrays for shard in array.shards for device in shard.devices)
        return _MAX_UNPACKED_BYTES if all(device.platform == "cpu" for device in devices) else self._max_bytes

    def _make_room(self, spec: ParamSpec, shardings: Params, quantize: str | None) -> list[_Array]:
        rounds = quantize != self._reader.quantize
        arrays = []
        for part in stored_specs(spec, quantize):
            wanted: Sharding = get_param(shardings, part)
            read = self._read_sharding(part, wanted, rounds)
            if part.dtype is not None:
                dtype = np.dtype(part.dtype)
            else:
                dtype = self._reader.dtype(part) if self._dtype is None else jnp.dtype(self._dtype)
            devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
            for device, index in read.addressable_devices_indices_map(part.shape).items():
                assert index is not None
                bounds = tuple(place.indices(n)[:2] for place, n in zip(index, part.shape, strict=True))
                devices.setdefault(bounds, []).append(device)
            shards = tuple(
                _Shard(
                    tuple(low for low, _ in bounds), _empty(tuple(high - low for low, high in bounds), dtype), tuple(of)
                )
                for bounds, of in devices.items()
            )
            arrays.append(_Array(part, shards, read, wanted))
        return arrays

    def _read_sharding(self, part: ParamSpec, wanted: Sharding, rounds: bool) -> Sharding:
        """How the array is spread over the processes while it is read.

        Where each process needs some columns, but only whole rows can be read (or rounded), each reads a share of the
        rows, and the devices exchange the rest: every byte is read once.
        """
        if wanted.is_fully_addressable or not isinstance(wanted, NamedSharding):
            return wanted
        has_columns = len(part.shape) > 1 and wanted.shard_shape(part.shape)[1] < part.shape[1]
        needs_rows = has_columns and (rounds or self._reader.num_columns(part) == part.shape[1])
        needs_rows = needs_rows or (rounds and part.path[-1] == "scale" and wanted.is_fully_replicated)
        num_devices = wanted.mesh.size
        if not needs_rows or part.shape[0] % num_devices:
            return wanted
        return NamedSharding(wanted.mesh, PartitionSpec(wanted.mesh.axis_names))

    def _jobs(self, spec: ParamSpec, arrays: list[_Array]) -> Iterator[Any]:
        """What reads the blocks that the arrays need, each a call."""
        if len(arrays) > 1 and self._reader.quantize is None:
            for rows in self._row_blocks(spec, arrays, spec.shape[1]):
                yield lambda rows=rows: self._round(spec, arrays, rows)
            return
        for array in arrays:
            width = self._reader.num_columns(array.part)
            total = array.part.shape[1] if len(array.part.shape) > 1 else 1
            for left, rows in itertools.product(range(0, total, width), self._row_blocks(array.part, [array], width)):
                columns = slice(left, min(left + width, total))
                yield lambda array=array, rows=rows, columns=columns: self._copy(array, rows, columns)

    def _row_blocks(self, part: ParamSpec, arrays: list[_Array], width: int) -> Iterator[slice]:
        """The rows that the arrays' shards need, in blocks cut where shards end."""
        multiple = self._reader.row_multiple(part)
        row_bytes = width * (1 if part.dtype == "int8" else self._reader.dtype(part).itemsize)
        step = max(1, _BLOCK_BYTES // (row_bytes * multiple)) * multiple
        spans = {(shard.start[0], shard.start[0] + shard.data.shape[0]) for array in arrays for shard in array.shards}
        cuts = {cut // multiple * multiple for span in spans for cut in span} | {part.shape[0]}
        start = 0
        for cut in sorted(cuts):
            for low in range(start, cut, step):
                high = min(low + step, cut)
                if any(low < end and begin < high for begin, end in spans):
                    yield slice(low, high)
            start = cut

    def _copy(self, array: _Array, rows: slice, columns: slice) -> None:
        is_matrix = len(array.part.shape) > 1
        start = (rows.start, columns.start) if is_matrix else (rows.start,)
        shape = (rows.stop - rows.start, columns.stop - columns.start)[: len(start)]
        touched = [shard for shard in array.shards if _overlap(shard, start, shape)]
        if not touched:
            return
        out = touched[0].view(start, shape, self._reader.dtype(array.part)) if len(touched) == 1 else None
        block = self._reader.read(array.part, rows, columns, out)
        if block is not out:
            for shard in touched:
                shard.put(block, start)

    def _round(self, spec: ParamSpec, arrays: list[_Array], rows: slice) -> None:
        values, scale = self._reader.read_rounded(spec, rows)
        for shard in arrays[0].shards:
            shard.put(values, (rows.start, 0))
        for shard in arrays[1].shards:
            shard.put(scale, (rows.start,))

    def _finish(self, spec: ParamSpec, arrays: list[_Array], reads: list[Future[None]]) -> tuple[ParamSpec, Any]:
        for read in reads:
            read.result()
        parts = [array.to_devices() for array in arrays]
        # The host's copies are free when the devices have theirs.
        jax.block_until_ready(parts)
        return spec, parts[0] if len(parts) == 1 else QuantizedWeight(*parts)


def _overlap(shard: _Shard, start: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(
        mine < other + length and other < mine + size
        for mine, size, other, length in zip(shard.start, shard.data.shape, start, shape, strict=True)
    )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)
