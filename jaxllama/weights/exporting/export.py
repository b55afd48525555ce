"""Writes an export: plans the files, reads blocks ahead, and leaves nothing that looks complete if it is killed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jaxllama.errors import CheckpointError, ConversionError, LockstepError, StoreError, quote
from jaxllama.hosts.group import Group
from jaxllama.model.config.families import BY_MODEL_TYPE
from jaxllama.model.params import Params, num_params, stored_specs
from jaxllama.system.progress import OnBytes
from jaxllama.system.staging import check_apart, resolve_destination
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.arrays.files import PARAMS
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.exporting.destination import LAST, Destination, open_destination
from jaxllama.weights.exporting.rows import DeviceRows, Rows, StoredRows
from jaxllama.weights.exporting.shards import INDEX, MAX_SHARD_BYTES, Shard, index_of, make_shards, num_bytes_of
from jaxllama.weights.exporting.tensors import DTYPES, Block, blocks, export_tensors, quantization_config, read_block
from jaxllama.weights.opening import open_model
from jaxllama.weights.places import LocalPlace, Place, PlaceLike, open_place

type _OnWritten = Callable[[int, str], None]

# Blocks of 8 MiB that are being read or wait to be written.
_MAX_BLOCKS_AHEAD = 16


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: `num_bytes` of tensors in `num_files` files, as `dtype`, matrices int8 if `quantize` is."""

    where: str
    dtype: str
    quantize: str | None
    num_params: int
    num_bytes: int
    num_files: int
    seconds: float


def export(
    src: PlaceLike,
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: str | int = MAX_SHARD_BYTES,
    force: bool = False,
    adapters: Sequence[PlaceLike] = (),
    progress: OnBytes | None = None,
) -> ExportReport:
    """Writes a checkpoint as a Hugging Face folder: safetensors, index, config.json and the tokenizer's files.

    `src` may be anywhere, and a source that is not converted. `dtype` None keeps every value as it is stored: bfloat16
    that was converted comes out as the same bytes, int8 as compressed-tensors' W8A16. With "bfloat16", "float16" or
    "float32" all of it is that, int8 matrices too. `max_shard_size` ("5GB", "2GiB", or bytes) bounds the files.
    `adapters` of PEFT are merged into the weights, in order; into int8 ones once they are dense, in the dtype of the
    rest. Nothing is at `dst` before all is complete; `force` replaces an earlier export, which stays until then.

    Raises: ConversionError for `dst` or a value that the dtype cannot hold; CheckpointError, ConfigError or PlaceError
        for `src`; StoreError or OSError when reading or writing fails.
    """
    place = open_place(src)
    destination = _resolve(dst, place)
    checkpoint = open_model(place, adapters)
    return _export(checkpoint, StoredRows(checkpoint), destination, dtype, max_shard_size, force, progress)


def export_params(
    checkpoint: Checkpoint | None,
    params: Params,
    dst: str | os.PathLike[str],
    group: Group | None,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: OnBytes | None = None,
) -> ExportReport:
    """`export` of weights on a mesh, of a model of `checkpoint`. The host holds one tensor at a time.

    Of a group, process 0 calls this, and the others answer with `answer_rows`: only process 0 writes.

    Raises: as `export`; CheckpointError for a model of no checkpoint; LockstepError.
    """
    if group is not None and not group.is_leader:
        raise LockstepError(f"process {group.process_id} follows process 0, which alone exports")
    if checkpoint is None:
        raise CheckpointError(f"{dst}: this model is of no checkpoint, whose config and tokenizer could be exported")
    destination = _resolve(dst, checkpoint.place)
    rows = DeviceRows(params, group)
    with contextlib.closing(rows):
        return _export(checkpoint, rows, destination, dtype, max_shard_size, force, progress)


def _resolve(dst: str | os.PathLike[str], source: Place | None) -> Path | str:
    """A path, or the address of a bucket's folder. Raises: ConversionError for one in the source, or around it."""
    if "://" in (url := os.fspath(dst)):
        here, there = f"{url.rstrip('/')}/", f"{source}/"
        if here.startswith(there) or there.startswith(here):
            raise ConversionError(f"{url}: is inside the source {source}, or around it; choose another folder")
        return url
    destination = resolve_destination(dst, ConversionError)
    if isinstance(source, LocalPlace):
        check_apart(Path(source / source.file if source.file else source.where), destination, ConversionError)
    return destination


def _export(
    checkpoint: Checkpoint,
    rows: Rows,
    destination: Path | str,
    dtype: str | None,
    max_shard_size: str | int,
    force: bool,
    progress: OnBytes | None,
) -> ExportReport:
    started = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {quote(dtype)} is not supported, expected one of {', '.join(DTYPES)}")
    max_shard_bytes = num_bytes_of(max_shard_size)
    packs = rows.quantize is not None and dtype is None
    dtype = dtype or rows.dtype
    tensors = export_tensors(checkpoint.config, dtype, packs=packs)
    shards = make_shards(tensors, max_shard_bytes)
    config = _config(checkpoint, dtype, packs=packs)
    total = sum(tensor.num_bytes for tensor in tensors)
    with open_destination(destination, _identity(checkpoint, rows, shards, config), force=force) as folder:
        try:
            _write_shards(folder, shards, rows, lambda done, name: progress(done, total, name) if progress else None)
            _write_text(folder, checkpoint, shards, config)
        except OSError as error:
            raise StoreError(f"{destination}: cannot be written ({error.filename}: {error.strerror})") from error
    quantize = rows.quantize if packs else None
    seconds = time.monotonic() - started
    where = str(destination)
    return ExportReport(where, dtype, quantize, num_params(checkpoint.config), total, len(shards), seconds)


def _identity(checkpoint: Checkpoint, rows: Rows, shards: list[Shard], config: bytes) -> dict[str, str]:
    """What is exported: the same again has the same bytes. Of what is on devices, or has no hashes, nobody knows."""
    if isinstance(rows, DeviceRows) or checkpoint.place is None:
        return {"export": secrets.token_hex(16)}
    parts = [checkpoint.manifest.to_json().encode(), config, *(shard.header() for shard in shards)]
    return {"export": hashlib.sha256(b"".join(parts)).hexdigest()}


def _write_text(folder: Destination, checkpoint: Checkpoint, shards: list[Shard], config: bytes) -> None:
    """Everything but the weights, config.json last."""
    for name in checkpoint.manifest.files:
        if not name.startswith(f"{PARAMS}/") and name != LAST:
            data = (checkpoint.path / name).read_bytes()
            folder.write(name, len(data), [data])
    if len(shards) > 1:
        index = index_of(shards)
        folder.write(INDEX, len(index), [index])
    folder.write(LAST, len(config), [config])


def _write_shards(folder: Destination, shards: list[Shard], rows: Rows, on_written: _OnWritten) -> None:
    parts = [
        part
        for shard in shards
        for tensor in shard.tensors
        for spec in tensor.specs
        for part in stored_specs(spec, rows.quantize)
    ]
    done = 0
    pool = ThreadPoolExecutor(rows.num_readers, "jaxllama-export")
    try:
        rows.prepare(dict.fromkeys(parts), pool)
        for shard in shards:
            todo = (block for tensor in shard.tensors for block in blocks(tensor, rows))
            header, size = shard.header(), sum(tensor.num_bytes for tensor in shard.tensors)
            data = _counted(_read_ahead(todo, rows, pool), done, on_written)
            folder.write(shard.name, len(header) + size, itertools.chain([header], data))
            done += size
        on_written(done, "")
    finally:
        pool.shutdown(cancel_futures=True)


def _counted(
    read: Iterable[tuple[Block, UInt8[np.ndarray, " bytes"]]], done: int, on_written: _OnWritten
) -> Iterator[bytes | UInt8[np.ndarray, " bytes"]]:
    for block, data in read:
        on_written(done, block.tensor.name)
        yield data
        done += data.nbytes


def _read_ahead(todo: Iterable[Block], rows: Rows, pool: Executor) -> Iterator[tuple[Block, np.ndarray]]:
    """Every block and its bytes, in order, while those after it are read."""
    begun: deque[tuple[Block, Future[np.ndarray]]] = deque()
    for block in todo:
        begun.append((block, pool.submit(read_block, block, rows)))
        if len(begun) >= _MAX_BLOCKS_AHEAD:
            first, future = begun.popleft()
            yield first, future.result()
    while begun:
        first, future = begun.popleft()
        yield first, future.result()


def _config(checkpoint: Checkpoint, dtype: str, *, packs: bool) -> bytes:
    """config.json of the export: the checkpoint's own bytes, if they say what is written."""
    path = checkpoint.path / LAST
    stored = path.read_bytes()
    value = parse_object(stored, path, CheckpointError)
    changed = {key: item for key, item in value.items() if key != "auto_map"}  # the code is not there
    for key in [key for key in ("dtype", "torch_dtype") if key in value] or ["torch_dtype"]:
        changed[key] = dtype
    if not value.get("architectures"):
        changed["architectures"] = [BY_MODEL_TYPE[value["model_type"]].architecture]
    if packs:
        changed["quantization_config"] = quantization_config(checkpoint.config)
    return stored if changed == value else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
