"""Checkpoints: what `convert` writes and `load` reads.

    DST/params/          an Orbax PyTree checkpoint of the Params tree; plain Orbax restores it without jaxllama
    DST/config.json      and generation_config.json, tokenizer files, chat template
    DST/manifest.json    written last: without it the checkpoint is incomplete

Each tensor is a zarr array of its own, uncompressed, cut along the dimension that tensor parallelism cuts, so that a
device reads its shard and nothing else. A matrix of an int8 checkpoint is two, NAME.values and NAME.scale.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from jaxllama.errors import CheckpointError, ConfigError, listed, one_line, quote
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import (
    QUANTIZATIONS,
)
from jaxllama.system.hashing import Hasher
from jaxllama.system.progress import OnBytes
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.arrays.files import PARAMS, FileRecord, hash_file, write_file
from jaxllama.weights.places import Place, PlaceLike, is_remote, open_place
from jaxllama.weights.reading import CheckpointReader, Reader

FORMAT = "jaxllama-checkpoint"
VERSION = 2
"""Version 1 had sha256 of every file and did not name it."""
MANIFEST = "manifest.json"
DTYPES = ("bfloat16", "float32")

_MAX_JSON_BYTES = 256 * 2**20
_HASHED_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of and came from.

    `files` are relative to the checkpoint. `source` has `kind`, `name` and `files` (name to size and hash).
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
        if value.get("version") not in (1, VERSION):
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
            files = {name: FileRecord.from_json(r) for name, r in value["files"].items()}
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
        place, manifest = open_manifest(path)
        folder, scratch = Path(place.where), None
        if is_remote(place):
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
        if self.place is not None:
            _raise_damaged(self.place.where, find_damage(self.place, self.manifest, on_bytes))


def open_manifest(path: PlaceLike) -> tuple[Place, Manifest]:
    """A checkpoint's place, and what should be there. Raises: CheckpointError when it is none; PlaceError."""
    if is_remote(path):
        place = open_place(path)
        return place, Manifest.parse(_read_remote_manifest(place), place / MANIFEST)
    folder = Path(path).expanduser().absolute() if not isinstance(path, Place) else Path(path.where)
    _check_is_checkpoint(folder)
    return open_place(folder, confined=False), Manifest.load(folder)


def find_damage(place: Place, manifest: Manifest, on_bytes: OnBytes = lambda done, total, at_work: None) -> list[str]:
    """Each file that is missing, changed or not in the manifest, with what was expected and what is there.

    Hashes every file that has its size. `on_bytes` is told how far it is.

    Raises: StoreError.
    """
    problems = list(_size_problems(place, manifest))
    damaged = {problem.split(":", 1)[0] for problem in problems}
    names = [name for name in manifest.files if name not in damaged]
    done, total = 0, sum(manifest.files[name].size for name in names)
    with contextlib.closing(place), ThreadPoolExecutor(place.num_readers) as pool:
        expected = [manifest.files[name].hash for name in names]
        hashes = pool.map(functools.partial(_hash_at, place), names, expected)
        for name, want, got in zip(names, expected, hashes, strict=True):
            done += manifest.files[name].size
            on_bytes(done, total, f"verifying {name}")
            if got != want:
                kind, _, digits = got.partition(":")
                problems.append(f"{name}: {kind} is {digits[:12]}…, expected {want.partition(':')[2][:12]}…")
    there = {name for name in place.all_names() if name.startswith(f"{PARAMS}/")}
    problems += [f"{name}: not in the manifest" for name in sorted(there - set(manifest.files))]
    return problems


def read_configs(folder: Path) -> tuple[LlamaConfig, Mapping[str, Any]]:
    """The model's config, its end-of-reply ids already generation_config.json's where it names any, and the latter.

    Raises: ConfigError, or CheckpointError when a file is no JSON object.
    """
    generation_config = _read_json(folder / "generation_config.json", missing={})
    config = LlamaConfig.from_hf(_read_json(folder / "config.json"))
    return replace(config, eos_token_ids=_eos_token_ids(config, generation_config)), generation_config


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
    write_file(partial, Manifest(dtype, source, files, versions(), quantize).to_json().encode())
    os.rename(partial, folder / MANIFEST)


def versions() -> dict[str, str]:
    """What a checkpoint that is written here is written with."""
    return {name: _version(name) for name in ("jaxllama", "jax", "orbax-checkpoint")} | {
        "python": platform.python_version()
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


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


def _hash_at(place: Place, name: str, like: str) -> str:
    """The hash of a file, of the kind that `like` is."""
    file, hasher = place.stat(name), Hasher(like.partition(":")[0])
    if file is None:
        raise CheckpointError(f"{place / name}: missing")
    buffer = bytearray(min(file.size, _HASHED_BYTES))
    for offset in range(0, file.size, _HASHED_BYTES):
        view = memoryview(buffer)[: min(_HASHED_BYTES, file.size - offset)]
        place.read_into(file, offset, view)
        hasher.update(view)
    return hasher.value()


def _size_problems(place: Place, manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        file = place.stat(name)
        size = None if file is None else file.size
        if size is None:
            yield f"{one_line(name)}: missing"
        elif size != record.size:
            yield f"{one_line(name)}: {size} bytes, expected {record.size}"


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
