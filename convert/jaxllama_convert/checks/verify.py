"""Whether a checkpoint is what was written, and whether that is what its source has."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxllama.errors import CheckpointError, ConversionError, StoreError, listed, one_line, quote
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import ParamSpec, stored_specs
from jaxllama.system.progress import OnBytes
from jaxllama.weights.checkpoint import Checkpoint, find_damage, open_manifest
from jaxllama.weights.places import PlaceLike
from jaxllama.weights.sources.adapters.merging import merge_adapters
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.source import SourceTensor
from jaxllama.weights.sources.stored import Pairs, Storage, read_rounded, read_stored

_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Verification:
    """What was checked of a checkpoint, and what is wrong, each in a line that names the file or the tensor.

    `num_tensors` is None if there was nothing to compare with.
    """

    num_files: int
    num_bytes: int
    num_tensors: int | None
    problems: tuple[str, ...]


def verify(
    checkpoint: PlaceLike,
    against: PlaceLike | None = None,
    *,
    adapters: Sequence[PlaceLike] = (),
    progress: OnBytes = lambda done, total, name: None,
) -> Verification:
    """Hashes every file of a checkpoint; with `against`, compares every tensor with the source's, bit by bit.

    The source's tensors are converted as the checkpoint's were: with `adapters` merged, which must be those that the
    manifest names, to its dtype, and to int8 if its matrices are. A checkpoint with damaged files is compared no
    further.

    Raises: CheckpointError for what is no checkpoint; ConversionError, ConfigError or PlaceError for a source that
        cannot be read; StoreError.
    """
    place, manifest = open_manifest(checkpoint)
    problems = find_damage(place, manifest, progress)
    num_bytes = sum(record.size for record in manifest.files.values())
    num_tensors = None
    if against is not None and not problems:
        num_tensors, problems = _compare(Checkpoint.open(checkpoint), against, adapters, progress)
    return Verification(len(manifest.files), num_bytes, num_tensors, tuple(problems))


def _compare(
    checkpoint: Checkpoint, against: PlaceLike, adapters: Sequence[PlaceLike], progress: OnBytes
) -> tuple[int, list[str]]:
    storage = Storage(checkpoint.dtype, checkpoint.manifest.quantize)
    with contextlib.closing(open_source(against)) as source:
        pairs: Pairs = match_tensors(LlamaConfig.from_hf(source.config), source.tensors, source.name)
        merged = merge_adapters(source, pairs, adapters)
        stored = checkpoint.manifest.source.get("adapters", [])
        if stored != list(merged.records):
            return 0, [
                f"it has the adapters {_names(stored)}, compared is with {_names(merged.records)}: give --adapter"
            ]
        pairs = merged.pairs
        problems = list(_differing_files(checkpoint, merged.source.sidecars))
        reader, num_readers = checkpoint.reader, max(file.place.num_readers for file in source.files)
        done, total = 0, storage.num_bytes(pairs)
        with ThreadPoolExecutor(min(num_readers, 2 * (os.cpu_count() or 1))) as pool:
            try:
                reader.prepare([part for spec, _ in pairs for part in stored_specs(spec, storage.quantize)], pool)
            except CheckpointError as error:
                return 0, [*problems, str(error)]
            for pair in pairs:
                found = pool.map(partial(_differing_rows, checkpoint, pair, storage), _blocks(pair, storage))
                if (first := next(filter(None, found), None)) is not None:
                    problems.append(first)
                done += storage.num_bytes([pair])
                progress(done, total, f"comparing {pair[0].name}")
    return len(pairs), problems


def _names(records: Iterable[Any]) -> str:
    """Of adapters: what they are called and the beginning of their weights' hashes."""
    named = [
        f"{quote(record.get('name'))} ({', '.join(str(file.get('hash'))[:16] for file in record['files'].values())})"
        for record in records
        if isinstance(record, Mapping) and isinstance(record.get("files"), Mapping)
    ]
    return listed(named) or "none"


def _differing_files(checkpoint: Checkpoint, sidecars: Mapping[str, bytes]) -> Iterator[str]:
    for name, data in sidecars.items():
        path = checkpoint.path / name
        if not path.exists():
            yield f"{one_line(name)}: missing, the source has it"
        elif path.read_bytes() != data:
            yield f"{one_line(name)}: {path.stat().st_size} bytes that are not the source's {len(data)}"


def _blocks(pair: tuple[ParamSpec, SourceTensor], storage: Storage) -> list[slice]:
    spec, tensor = pair
    row_bytes = max(1, storage.num_bytes([pair]) // spec.shape[0])
    step = max(1, _BLOCK_BYTES // (row_bytes * tensor.row_multiple)) * tensor.row_multiple
    return [slice(start, min(start + step, spec.shape[0])) for start in range(0, spec.shape[0], step)]


def _differing_rows(
    checkpoint: Checkpoint, pair: tuple[ParamSpec, SourceTensor], storage: Storage, rows: slice
) -> str | None:
    """What is said of the first value that differs, None if there is none."""
    spec, tensor = pair
    try:
        if storage.is_quantized(spec):
            want = tuple(read_rounded(tensor, rows.start, rows.stop, storage.numpy_dtype))
        else:
            want = (read_stored(tensor, rows.start, rows.stop, storage.numpy_dtype),)
    except StoreError:
        raise
    except ConversionError as error:
        return f"{spec.name}: {error}"
    for part, expected in zip(stored_specs(spec, storage.quantize), want, strict=True):
        columns = slice(0, math.prod(part.shape[1:]))
        got = checkpoint.reader.read(part, rows, columns, None)
        if got.dtype != expected.dtype:
            return f"{part.name}: is {got.dtype}, expected {expected.dtype}"
        same = got.view(np.uint8).reshape(*got.shape, -1) == expected.view(np.uint8).reshape(*expected.shape, -1)
        if not same.all():
            where = np.argwhere(~same.all(axis=-1))
            index = tuple(map(int, where[0]))
            place = [index[0] + rows.start, *index[1:]]
            return f"{part.name}: {place} is {got[index]}, the source has {expected[index]} ({len(where)} differ there)"
    return None
