"""How an array becomes files: the chunks of a zarr array, so cut that a device, or a process, has whole ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from jaxllama.model.params import ParamSpec

_MAX_CHUNK_BYTES = 64 * 2**20
_MIN_CHUNK_BYTES = 2**20
# Tensor parallelism up to 16 finds its shards on chunk borders.
_CHUNKS_PER_TENSOR = 16


def chunk_shape(spec: ParamSpec, itemsize: int) -> tuple[int, ...]:
    """How an array in one piece is cut: along the dimension that tensor parallelism cuts, a megabyte each at least."""
    axis = next((i for i, name in enumerate(spec.axes) if name != "embed"), 0)
    rows, num_bytes, num = spec.shape[axis], spec.size * itemsize, 1
    while num < _CHUNKS_PER_TENSOR and rows % (2 * num) == 0 and num_bytes // (2 * num) >= _MIN_CHUNK_BYTES:
        num *= 2
    num = min(rows, num * math.ceil(num_bytes / num / _MAX_CHUNK_BYTES))
    return tuple(math.ceil(n / num) if i == axis else n for i, n in enumerate(spec.shape))


def chunk_of_shards(part: ParamSpec, array: Shaped[jax.Array, " ..."]) -> tuple[int, ...]:
    """How an array on devices is cut: much as one in one piece, but no chunk has parts of two shards."""

    def cut(size: int, shard: int, whole: int) -> int:
        if shard == whole:
            return size
        best = max(n for n in range(1, min(size, shard) + 1) if shard % n == 0)
        # A shard of a prime number of rows stays whole rather than become thousands of files.
        return best if 8 * best >= size else shard

    sizes = chunk_shape(part, array.dtype.itemsize)
    return tuple(map(cut, sizes, array.sharding.shard_shape(array.shape), array.shape))


def chunks(
    array: Shaped[np.ndarray, " ..."], chunk: tuple[int, ...], start: tuple[int, ...]
) -> Iterator[tuple[str, Shaped[np.ndarray, " ..."]]]:
    """The zarr name and the values of every chunk of a piece that begins at `start`; they may be less than a chunk."""
    for index in np.ndindex(*map(math.ceil, np.divide(array.shape, chunk))):
        block = array[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, chunk, strict=True))]
        yield ".".join(str(i + begin // n) for i, begin, n in zip(index, start, chunk, strict=True)), block


def _new_memory(num_bytes: int) -> UInt8[np.ndarray, " bytes"]:
    return np.empty(num_bytes, np.uint8)


def chunk_bytes(
    block: Shaped[np.ndarray, " ..."],
    chunk: tuple[int, ...],
    memory: Callable[[int], UInt8[np.ndarray, " bytes"]] = _new_memory,
) -> memoryview:
    """The bytes of a chunk's file, padded with zeros where there are too few values; copied to `memory` if need be."""
    if block.shape != chunk or not block.flags.c_contiguous:
        whole = memory(math.prod(chunk) * block.dtype.itemsize).view(block.dtype).reshape(chunk)
        if block.shape != chunk:
            whole[...] = 0
        whole[tuple(map(slice, block.shape))] = block
        block = whole
    return memoryview(block.reshape(-1).view(np.uint8))


def zarr_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Source: Zarr storage specification version 2; `bfloat16` is TensorStore's extension of it."""
    value = {
        "chunks": chunk,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": "bfloat16" if dtype == jnp.bfloat16 else dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }
    return json.dumps(value).encode()
