"""Writes the arrays of a checkpoint, whole, in pieces, or shard by shard from devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from jaxllama.errors import CheckpointError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import ParamSpec, QuantizedWeight, param_specs, stored_specs
from jaxllama.weights.arrays.chunks import chunk_bytes, chunk_of_shards, chunk_shape, chunks, zarr_metadata
from jaxllama.weights.arrays.files import PARAMS, ArrayFiles, BucketFiles, FileRecord, FolderFiles
from jaxllama.weights.places.bucket import BucketPlace
from jaxllama.weights.places.upload import Upload


class ParamsWriter:
    """Writes the tensors of a checkpoint one at a time, or many at once, then makes them an Orbax checkpoint.

    `where` is a folder of this machine, an upload to a bucket, or, for a process that helps with one, its place. The
    whole tree is never in memory. What is written outlives the process: `is_staged` tells a second run.
    """

    def __init__(
        self, where: Path | Upload | BucketPlace, config: LlamaConfig, dtype: str, quantize: str | None = None
    ) -> None:
        self._config = config
        self._dtype = jnp.dtype(dtype)
        self._quantize = quantize
        arrays = [part.name for spec in param_specs(config) for part in stored_specs(spec, quantize)]
        self._files: ArrayFiles = FolderFiles(where, arrays) if isinstance(where, Path) else BucketFiles(where)

    def is_staged(self, files: Mapping[str, FileRecord]) -> bool:
        """Whether every one of a tensor's `files` is there with its size."""
        return bool(files) and self._files.has(files)

    def write(self, spec: ParamSpec, weight: Shaped[np.ndarray, " ..."] | QuantizedWeight) -> dict[str, FileRecord]:
        """Writes one tensor, whole, and returns its files as the manifest names them.

        Raises: OSError when the disk is full or unwritable; StoreError.
        """
        parts = stored_specs(spec, self._quantize)
        arrays = tuple(weight) if isinstance(weight, QuantizedWeight) else (weight,)
        got = [f"{array.dtype}{array.shape}" for array in arrays]
        expected = [f"{self._dtype_of(part)}{part.shape}" for part in parts]
        if got != expected:
            raise CheckpointError(f"{spec.name}: got {' and '.join(got)}, expected {' and '.join(expected)}")
        files: dict[str, FileRecord] = {}
        for part, array in zip(parts, arrays, strict=True):
            files |= self.begin(part) | self.write_piece(part, array, (0,) * array.ndim)
        return files

    def chunk_of(self, part: ParamSpec) -> tuple[int, ...]:
        """How `begin` cuts an array that is on no devices."""
        return chunk_shape(part, self._dtype_of(part).itemsize)

    def begin(self, part: ParamSpec, array: Shaped[jax.Array, " ..."] | None = None) -> dict[str, FileRecord]:
        """Makes room for an array that comes in pieces: those of `write_shards`, if it is on devices.

        Returns the one file that does not depend on the values. Raises: OSError, StoreError.
        """
        self._files.begin(part.name)
        chunk = self.chunk_of(part) if array is None else chunk_of_shards(part, array)
        name, metadata = f"{PARAMS}/{part.name}/.zarray", zarr_metadata(part.shape, chunk, self._dtype_of(part))
        return {name: self._files.write(name, metadata)}

    def write_piece(
        self, part: ParamSpec, array: Shaped[np.ndarray, " ..."], start: tuple[int, ...]
    ) -> dict[str, FileRecord]:
        """Writes whole chunks, those that begin at `start`. Raises: OSError, StoreError."""
        return self._write_chunks(part, self.chunk_of(part), array, start)

    def files_of(
        self, part: ParamSpec, array: Shaped[np.ndarray, " ..."], start: tuple[int, ...]
    ) -> Iterator[tuple[str, Shaped[np.ndarray, " ..."]]]:
        """The files of whole chunks, those that begin at `start`: each one's name and its values, for `write_block`."""
        return self._files_of(part, self.chunk_of(part), array, start)

    def write_block(
        self,
        part: ParamSpec,
        name: str,
        block: Shaped[np.ndarray, " ..."],
        memory: Callable[[int], UInt8[np.ndarray, " bytes"]],
    ) -> FileRecord:
        """Writes one of `files_of`; `memory` gives uint8 of a size for what lies elsewhere than it is written.

        Raises: OSError, StoreError.
        """
        return self._files.write(name, chunk_bytes(block, self.chunk_of(part), memory))

    def write_shards(self, part: ParamSpec, array: Shaped[jax.Array, " ..."]) -> dict[str, FileRecord]:
        """Writes what this process's devices hold of `array`, the first of the copies of each shard. Returns the files.

        All processes together write every element once. The host holds one shard at a time.

        Raises: OSError, StoreError.
        """
        files: dict[str, FileRecord] = {}
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                # A view of its own: JAX keeps the host's copy for as long as the array that was asked for it.
                view = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
                start = tuple(place.start or 0 for place in shard.index)
                files |= self._write_chunks(part, chunk_of_shards(part, array), np.asarray(view), start)
        return files

    def prepare_commit(self) -> None:
        """Imports what `commit` needs, for a thread that has nothing better to do."""
        import jaxllama.weights.arrays.orbax_tree  # noqa: F401

    def commit(self) -> dict[str, FileRecord]:
        """Turns what is written into the Orbax checkpoint `params`. Every tensor must be there. Returns Orbax's files.

        Raises: OSError, StoreError; ValueError or RuntimeError of Orbax.
        """
        # Here: Orbax takes half a second of CPU time to import, and loading does without it.
        from jaxllama.weights.arrays.orbax_tree import write_tree

        return self._files.commit(
            lambda folder, take: write_tree(folder, self._config, self._quantize, self._dtype_of, take)
        )

    def _write_chunks(
        self, part: ParamSpec, chunk: tuple[int, ...], array: Shaped[np.ndarray, " ..."], start: tuple[int, ...]
    ) -> dict[str, FileRecord]:
        blocks = self._files_of(part, chunk, array, start)
        return {name: self._files.write(name, chunk_bytes(block, chunk)) for name, block in blocks}

    def _files_of(
        self, part: ParamSpec, chunk: tuple[int, ...], array: Shaped[np.ndarray, " ..."], start: tuple[int, ...]
    ) -> Iterator[tuple[str, Shaped[np.ndarray, " ..."]]]:
        return ((f"{PARAMS}/{part.name}/{name}", block) for name, block in chunks(array, chunk, start))

    def _dtype_of(self, part: ParamSpec) -> np.dtype:
        return jnp.dtype(part.dtype or self._dtype)
