"""Checkpoints on disk: what `convert` writes and `load` reads. The only module that knows Orbax.

    DST/params/          an Orbax PyTree checkpoint of the Params tree; plain Orbax restores it without jaxllama
    DST/config.json      and generation_config.json, tokenizer files, chat template
    DST/manifest.json    written last: without it the checkpoint is incomplete

Each tensor is a zarr array of its own, uncompressed, cut along the dimension that tensor parallelism cuts, so that a
device reads its shard and nothing else. A matrix of an int8 checkpoint is two, NAME.values and NAME.scale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxllama.errors import CheckpointError, ConfigError, listed, one_line, quote
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import (
    QUANTIZATIONS,
    ParamSpec,
    QuantizedWeight,
    build_params,
    param_specs,
    stored_specs,
)
from jaxllama.system.progress import OnBytes
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.array_files import chunk_of_shards, chunk_shape, chunks, zarr_metadata
from jaxllama.weights.places import Place, PlaceLike, is_remote, open_place
from jaxllama.weights.reading import PARAMS, CheckpointReader, Reader

FORMAT = "jaxllama-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
DTYPES = ("bfloat16", "float32")

_MAX_JSON_BYTES = 256 * 2**20
_HASHED_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of and came from.

    `files` are relative to the checkpoint. `source` has `kind`, `name` and `files` (name to size and sha256).
    `quantize` is "int8" if the matrices are; norms and biases have `dtype` all the same.
    """

    dtype: str
    source: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    quantize: str | None = None

    def to_json(self) -> str:
        """The text of manifest.json."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        value = {"format": FORMAT, "version": VERSION, "dtype": self.dtype, "quantize": self.quantize}
        return json.dumps({**value, "source": self.source, "files": files, "versions": self.versions}, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads and checks `folder/manifest.json`.

        Raises: CheckpointError when it is missing, malformed or of another version.
        """
        return cls.parse(_read_json(folder / MANIFEST), str(folder / MANIFEST))

    @classmethod
    def parse(cls, value: Mapping[str, Any], path: str) -> Manifest:
        """Checks what was read from `path`. Raises: CheckpointError, as `load`."""
        if value.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: not the manifest of a jaxllama checkpoint (its format is {quote(value.get('format'))})"
            )
        if value.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: checkpoint version {quote(value.get('version'))} is not supported, expected "
                f"{VERSION}. Convert the model again"
            )
        if value.get("dtype") not in DTYPES:
            raise CheckpointError(
                f"{path}: dtype {quote(value.get('dtype'))} is not supported, expected one of {', '.join(DTYPES)}"
            )
        quantize = value.get("quantize")
        if quantize not in (None, *QUANTIZATIONS):
            raise CheckpointError(f"{path}: quantization {quote(quantize)} is not supported, expected int8 or null")
        try:
            files = {name: FileRecord(int(r["size"]), str(r["sha256"])) for name, r in value["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: 'files' is malformed ({error}). Convert the model again") from None
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise CheckpointError(f"{path}: file name {quote(name)} leads out of the checkpoint")
        return cls(value["dtype"], value.get("source", {}), files, value.get("versions", {}), quantize)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything but the weights.

    `config.eos_token_ids` are generation_config.json's where it names any. `dtype` is the weights' dtype as they are
    stored, beside int8 matrices that of the rest. `path` is a folder of this machine that has all but the weights;
    `reader` reads those, wherever they are.
    """

    path: Path
    config: LlamaConfig
    dtype: str
    generation_config: Mapping[str, Any]
    manifest: Manifest
    reader: Reader = field(repr=False)
    place: Place | None = field(default=None, repr=False)
    scratch: TemporaryDirectory[str] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: PlaceLike) -> Checkpoint:
        """Opens a checkpoint and checks that every file has its size. Reads no weights.

        Raises: CheckpointError when it is missing, incomplete, truncated or of another version; ConfigError;
            PlaceError.
        """
        if not is_remote(path):
            folder = Path(path).expanduser().absolute() if not isinstance(path, Place) else Path(path.where)
            _check_is_checkpoint(folder)
            place, scratch = open_place(folder, confined=False), None
            manifest = Manifest.load(folder)
        else:
            place = open_place(path)
            manifest = Manifest.parse(_read_remote_manifest(place), place / MANIFEST)
            scratch = TemporaryDirectory(prefix="jaxllama-", ignore_cleanup_errors=True)
            folder = Path(scratch.name)
        with contextlib.closing(place):
            _raise_damaged(place.where, list(_size_problems(place, manifest)))
            if scratch is not None:
                _fetch_text(place, manifest, folder)
        config, generation_config = read_configs(folder)
        reader = CheckpointReader(place, manifest.files, manifest.quantize)
        return cls(folder, config, manifest.dtype, generation_config, manifest, reader, place, scratch)

    def manifest_bytes(self) -> bytes:
        """manifest.json as it is stored. Raises: CheckpointError when it is gone; StoreError."""
        data = None
        if self.place is not None:
            with contextlib.closing(self.place):
                data = self.place.read(MANIFEST)
        if data is None:
            raise CheckpointError(f"{self.path}: has no {MANIFEST} any more")
        return data

    def verify(self, on_bytes: OnBytes = lambda done, total, at_work: None) -> None:
        """Hashes every file and compares it with the manifest. Of a source that is not converted there is no hash.

        `on_bytes` is told how far it is.

        Raises: CheckpointError listing every file that is missing, changed or not in the manifest.
        """
        if self.place is None:
            return
        place, problems = self.place, list(_size_problems(self.place, self.manifest))
        damaged = {problem.split(":", 1)[0] for problem in problems}
        names = [name for name in self.manifest.files if name not in damaged]
        done, total = 0, sum(self.manifest.files[name].size for name in names)
        with contextlib.closing(place), ThreadPoolExecutor(place.num_readers) as pool:
            for name, got in zip(names, pool.map(lambda name: _hash_at(place, name), names), strict=True):
                done += self.manifest.files[name].size
                on_bytes(done, total, f"verifying {name}")
                expected = self.manifest.files[name].sha256
                if got != expected:
                    problems.append(f"{name}: sha256 is {got[:12]}…, expected {expected[:12]}…")
        there = {name for name in place.all_names() if name.startswith(f"{PARAMS}/")}
        problems += [f"{name}: not in the manifest" for name in sorted(there - set(self.manifest.files))]
        _raise_damaged(place.where, problems)


def read_configs(folder: Path) -> tuple[LlamaConfig, Mapping[str, Any]]:
    """The model's config, its end-of-reply ids already generation_config.json's where it names any, and the latter.

    Raises: ConfigError, or CheckpointError when a file is no JSON object.
    """
    generation_config = _read_json(folder / "generation_config.json", missing={})
    config = LlamaConfig.from_hf(_read_json(folder / "config.json"))
    return replace(config, eos_token_ids=_eos_token_ids(config, generation_config)), generation_config


def hash_file(path: Path) -> FileRecord:
    """Size and sha256 of a file, read once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


class ParamsWriter:
    """Writes the tensors of a checkpoint one at a time, then makes them an Orbax checkpoint.

    Tensors are staged in `folder/tensors/NAME`; `commit` has Orbax write its metadata and moves the staged arrays under
    it, so the whole tree is never in memory. A staged tensor outlives the process: `is_staged` tells a second run.
    """

    def __init__(self, folder: Path, config: LlamaConfig, dtype: str, quantize: str | None = None) -> None:
        self._folder = folder
        self._staging = folder / "tensors"
        self._config = config
        self._dtype = jnp.dtype(dtype)
        self._quantize = quantize
        self._staging.mkdir(exist_ok=True)
        self._recover()

    def is_staged(self, files: Mapping[str, FileRecord]) -> bool:
        """Whether every one of a tensor's `files` is there with its size."""
        sizes = (_size(self._staging / PurePosixPath(name).relative_to(PARAMS)) for name in files)
        return bool(files) and all(size == record.size for size, record in zip(sizes, files.values(), strict=True))

    def write(self, spec: ParamSpec, weight: np.ndarray | QuantizedWeight) -> dict[str, FileRecord]:
        """Stages one tensor, whole, and returns its files as the manifest names them.

        Raises: OSError when the disk is full or unwritable.
        """
        parts = stored_specs(spec, self._quantize)
        arrays = tuple(weight) if isinstance(weight, QuantizedWeight) else (weight,)
        got = [f"{array.dtype}{array.shape}" for array in arrays]
        expected = [f"{self._dtype_of(part)}{part.shape}" for part in parts]
        if got != expected:
            raise CheckpointError(f"{spec.name}: got {' and '.join(got)}, expected {' and '.join(expected)}")
        files: dict[str, FileRecord] = {}
        for part, array in zip(parts, arrays, strict=True):
            files |= self._write_array(part, array)
        return files

    def _write_array(self, part: ParamSpec, array: np.ndarray) -> dict[str, FileRecord]:
        chunk = chunk_shape(part, array.itemsize)
        return self._begin(part, chunk) | self._write_chunks(part, chunk, array, (0,) * array.ndim)

    def begin(self, part: ParamSpec, array: jax.Array) -> dict[str, FileRecord]:
        """Makes room for an array whose shards `write_shards` will stage, in this process and in others.

        Returns the one file that does not depend on the values.
        """
        return self._begin(part, chunk_of_shards(part, array))

    def write_shards(self, part: ParamSpec, array: jax.Array) -> dict[str, FileRecord]:
        """Stages what this process's devices hold of `array`, the first of the copies of each shard. Returns the files.

        All processes together write every element once. The host holds one shard at a time.

        Raises: OSError.
        """
        files: dict[str, FileRecord] = {}
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                # A view of its own: JAX keeps the host's copy for as long as the array that was asked for it.
                view = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
                start = tuple(place.start or 0 for place in shard.index)
                files |= self._write_chunks(part, chunk_of_shards(part, array), np.asarray(view), start)
        return files

    def _begin(self, part: ParamSpec, chunk: tuple[int, ...]) -> dict[str, FileRecord]:
        folder = self._staging / part.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        metadata = zarr_metadata(part.shape, chunk, self._dtype_of(part))
        return {f"{PARAMS}/{part.name}/.zarray": _write_file(folder / ".zarray", metadata)}

    def _write_chunks(
        self, part: ParamSpec, chunk: tuple[int, ...], array: np.ndarray, start: tuple[int, ...]
    ) -> dict[str, FileRecord]:
        return {
            f"{PARAMS}/{part.name}/{name}": _write_file(self._staging / part.name / name, data)
            for name, data in chunks(array, chunk, start)
        }

    def commit(self) -> None:
        """Turns the staged tensors into the Orbax checkpoint `folder/params`. Every tensor must be staged."""

        def staged(part: ParamSpec) -> _Staged:
            return _Staged(part.shape, self._dtype_of(part), self._staging / part.name)

        tree = build_params(self._config, staged, self._quantize)
        registry = ocp.type_handlers.create_type_handler_registry((_Staged, _MoveStaged()))
        # Of many processes one does this, and must not wait for the others.
        alone = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
        with _quiet_orbax():
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
            )
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
                checkpointer.save(self._folder / PARAMS, args=ocp.args.PyTreeSave(tree))
        self._staging.rmdir()

    def _dtype_of(self, part: ParamSpec) -> np.dtype:
        return jnp.dtype(part.dtype or self._dtype)

    def _recover(self) -> None:
        # A commit that was killed has moved some tensors, or all of them, out of the staging folder.
        for params in self._folder.glob(f"{PARAMS}*"):
            for spec in param_specs(self._config):
                for part in stored_specs(spec, self._quantize):
                    if (params / part.name).is_dir() and not (self._staging / part.name).exists():
                        os.rename(params / part.name, self._staging / part.name)
            shutil.rmtree(params)


@dataclass(frozen=True)
class _Staged:
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path


class _MoveStaged(ocp.type_handlers.TypeHandler):
    """Orbax's view of a staged tensor: an array whose bytes already are as Orbax would write them.

    NumPy's, not JAX's: those cannot be restored without naming a sharding.
    """

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            os.rename(value.path, info.parent_dir / info.name)
        return []


def write_manifest(
    folder: Path, dtype: str, quantize: str | None, source: Mapping[str, Any], files: Mapping[str, FileRecord]
) -> None:
    """Completes the checkpoint in `folder`: hashes what `files` does not have, then names them all."""
    files = dict(files)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            files[name] = hash_file(path)
    # A manifest is there whole or not at all.
    partial = folder / f"{MANIFEST}.partial"
    _write_file(partial, Manifest(dtype, source, files, versions(), quantize).to_json().encode())
    os.rename(partial, folder / MANIFEST)


def versions() -> dict[str, str]:
    """What a checkpoint that is written here is written with."""
    try:
        jaxllama = version("jaxllama")
    except PackageNotFoundError:
        jaxllama = "unknown"
    return {
        "jaxllama": jaxllama,
        "jax": jax.__version__,
        "orbax-checkpoint": ocp.__version__,
        "python": platform.python_version(),
    }


def _write_file(path: Path, data: bytes | memoryview) -> FileRecord:
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            # A full disk on a network file system shows here or never.
            os.fsync(file.fileno())
    except OSError as error:
        # Writes and fsync do not say which file it was.
        error.filename = error.filename or str(path)
        raise
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _check_is_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder}: {what}; expected a checkpoint folder. Make one with: jaxllama convert SRC {folder}"
        )
    if not (folder / MANIFEST).is_file():
        what = "an incomplete checkpoint" if (folder / PARAMS).exists() else "not a checkpoint"
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is {what}. Make one with: jaxllama convert SRC DST")


def _read_remote_manifest(place: Place) -> dict[str, Any]:
    data = None if place.file else place.read(MANIFEST)
    if data is None:
        what = "an incomplete checkpoint" if place.all_names() else "nothing there"
        raise CheckpointError(f"{place}: has no {MANIFEST}: {what}. Make one with: jaxllama convert SRC DST")
    return parse_object(data, place / MANIFEST, CheckpointError)


def _fetch_text(place: Place, manifest: Manifest, folder: Path) -> None:
    """Copies what is not weights into `folder`."""
    for name in manifest.files:
        if not name.startswith(f"{PARAMS}/") and (data := place.read(name)) is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def _hash_at(place: Place, name: str) -> str:
    file, digest = place.stat(name), hashlib.sha256()
    if file is None:
        raise CheckpointError(f"{place / name}: missing")
    buffer = bytearray(min(file.size, _HASHED_BYTES))
    for offset in range(0, file.size, _HASHED_BYTES):
        view = memoryview(buffer)[: min(_HASHED_BYTES, file.size - offset)]
        place.read_into(file, offset, view)
        digest.update(view)
    return digest.hexdigest()


def _size_problems(place: Place, manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        file = place.stat(name)
        size = None if file is None else file.size
        if size is None:
            yield f"{one_line(name)}: missing"
        elif size != record.size:
            yield f"{one_line(name)}: {size} bytes, expected {record.size}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _raise_damaged(where: str, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} damaged file(s): {listed(problems)}. Convert the model again")


def _eos_token_ids(config: LlamaConfig, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    value = generation_config.get("eos_token_id")
    ids = config.eos_token_ids if value is None else tuple(value) if isinstance(value, list) else (value,)
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
            raise ConfigError(
                f"generation_config.json: eos_token_id must be below vocab_size ({config.vocab_size}), "
                f"got {quote(token_id)}"
            )
    return ids


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.exists():
        return missing
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)})") from None
    return parse_object(data, path, CheckpointError)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Hides Orbax's routine messages, which it logs as warnings, for the duration of one call."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
