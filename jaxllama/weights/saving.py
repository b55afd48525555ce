"""From weights on a mesh to a checkpoint: every process writes its own shards, process 0 all the rest.

.NAME.saving/        beside the destination, for as long as the save takes; what a killed one leaves, the next removes
    lock             held by process 0
    checkpoint/      becomes the destination by one rename, when its manifest is written
    checkpoint/TOKEN the other processes look for it: do they see process 0's folder?
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxllama.errors import CheckpointError, LockstepError, one_line
from jaxllama.hosts.group import Group
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params, ParamSpec, param_specs, stored_specs
from jaxllama.system.staging import locked_folder, put_in_place, resolve_destination
from jaxllama.weights.arrays.files import PARAMS, FileRecord
from jaxllama.weights.arrays.writer import ParamsWriter
from jaxllama.weights.checkpoint import MANIFEST, Checkpoint, Manifest, versions, write_manifest
from jaxllama.weights.forms import get_whole
from jaxllama.weights.places.bucket import BucketPlace, open_bucket
from jaxllama.weights.places.upload import Upload, open_upload

# What a process has in flight: as many shards in memory, as many files that wait for the disk.
_NUM_WRITERS = 4
_SAVE = "save"
"""What a group's process 0 asks the others about."""


def save_params(
    source: Checkpoint | None, params: Params, path: str | os.PathLike[str], group: Group | None
) -> Checkpoint:
    """Writes `params`, of `source`'s config, as a checkpoint of its own at `path`, with the other files of `source`.

    `path` is a folder of this machine or of a bucket. Of a group, process 0 calls this, and the others `answer_saves`.
    There is no checkpoint at `path` before all is complete.

    Raises: CheckpointError when there is something at `path`, when it cannot be written, or when another process does
    not see the same folder; PlaceError or StoreError of a bucket; LockstepError.
    """
    if source is None:
        raise CheckpointError(f"{path}: this model is of no checkpoint, whose config and tokenizer could be saved")
    if group is not None and not group.is_leader:
        raise LockstepError(f"process {group.process_id} follows process 0, which alone saves")
    if "://" in os.fspath(path):
        return _save_to_bucket(source, params, os.fspath(path), group)
    destination = resolve_destination(path, CheckpointError)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists. Choose another folder, or remove it first")
    try:
        with _staging(destination) as folder:
            files = _write_all(source.config, params, folder, group)
            for name in source.manifest.files:
                if not name.startswith(f"{PARAMS}/"):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source.path / name, folder / name)
            files |= _writer(source.config, params, folder).commit()
            write_manifest(folder, _dtype(params), _quantize(params), _provenance(source), files)
            Checkpoint.open(folder)
            put_in_place(folder, destination)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be saved ({_describe(error)})") from error
    return Checkpoint.open(destination)


def _save_to_bucket(source: Checkpoint, params: Params, url: str, group: Group | None) -> Checkpoint:
    with open_upload(url, MANIFEST, advice="choose another folder, or remove it first") as upload:
        # What a save that was killed has left is of other weights.
        upload.begin({"format": "jaxllama-saving", "token": secrets.token_hex(16)})
        files = _write_all(source.config, params, upload, group)
        upload.add({name: record.size for name, record in files.items()})
        for name in source.manifest.files:
            if not name.startswith(f"{PARAMS}/"):
                data = (source.path / name).read_bytes()
                upload.write(name, data)
                files[name] = FileRecord.of(data)
        files |= _writer(source.config, params, upload).commit()
        manifest = Manifest(_dtype(params), _provenance(source), files, versions(), _quantize(params))
        upload.finish(manifest.to_json().encode(), owns=lambda name: name.startswith(f"{PARAMS}/"))
    return Checkpoint.open(url)


def _provenance(source: Checkpoint) -> Mapping[str, Any]:
    """Of a checkpoint its manifest, whose hash names all the rest; else what the source was."""
    if source.place is None:
        return source.manifest.source
    manifest = source.manifest_bytes()
    origin = {MANIFEST: asdict(FileRecord.of(manifest))}
    return {"kind": "jaxllama", "name": source.place.name, "files": origin}


def answer_saves(config: LlamaConfig, params: Params, group: Group) -> None:
    """What every process but 0 does: writes its shards whenever process 0 saves, beside whatever else it does."""

    def answer(question: bytes) -> bytes:
        where, token = json.loads(question)
        return json.dumps(_try_write(config, params, where, token)).encode()

    group.answer_with(_SAVE, answer)


def _write_all(config: LlamaConfig, params: Params, where: Path | Upload, group: Group | None) -> dict[str, FileRecord]:
    """All processes write their shards. Returns the files of all arrays."""
    token = secrets.token_hex(16)
    if isinstance(where, Path):
        (where / token).touch()
    writer = _writer(config, params, where)
    files: dict[str, FileRecord] = {}
    for part in _parts(config, params):
        files |= writer.begin(part, get_whole(params, part))
    with ThreadPoolExecutor(1) as asker:
        question = json.dumps([str(where if isinstance(where, Path) else where.place), token]).encode()
        others = asker.submit(lambda: [] if group is None else group.ask(_SAVE, question))
        results = [_try_write(config, params, where, token), *map(json.loads, others.result())]
    errors = [f"process {i}: {result['error']}" for i, result in enumerate(results) if "error" in result]
    if errors:
        text = "; ".join(errors) if group is not None else results[0]["error"]
        place = where.parent if isinstance(where, Path) else where.place
        raise CheckpointError(f"{place}: the checkpoint cannot be saved ({text})")
    if isinstance(where, Path):
        (where / token).unlink()
    for result in results:
        files |= {name: FileRecord(*record) for name, record in result["files"].items()}
    return files


def _try_write(config: LlamaConfig, params: Params, where: str | Path | Upload, token: str) -> dict[str, Any]:
    """Writes this process's shards. Returns `files`, each name with its size and hash, or the `error`."""
    try:
        if isinstance(where, str) and "://" in where:
            target: Path | Upload | BucketPlace = open_bucket(where)
        else:
            target = Path(where) if isinstance(where, str) else where
        if isinstance(target, Path) and not (target / token).exists():
            return {"error": f"{target} is not the folder that process 0 writes; it must be shared by all processes"}
        writer = _writer(config, params, target)
        with ThreadPoolExecutor(_NUM_WRITERS) as pool:
            written = pool.map(lambda part: writer.write_shards(part, get_whole(params, part)), _parts(config, params))
            return {"files": {name: [r.size, r.hash] for files in written for name, r in files.items()}}
    except Exception as error:
        return {"error": _describe(error)}


def _writer(config: LlamaConfig, params: Params, where: Path | Upload | BucketPlace) -> ParamsWriter:
    return ParamsWriter(where, config, _dtype(params), _quantize(params))


def _parts(config: LlamaConfig, params: Params) -> list[ParamSpec]:
    return [part for spec in param_specs(config) for part in stored_specs(spec, _quantize(params))]


def _dtype(params: Params) -> str:
    name: str = params["norm"].dtype.name
    return name


def _quantize(params: Params) -> str | None:
    # An array has no scale; int8 matrices have one, packed or not.
    return "int8" if getattr(params["embed_tokens"], "scale", None) is not None else None


@contextlib.contextmanager
def _staging(destination: Path) -> Iterator[Path]:
    """An empty folder beside `destination`, removed at the end with what is still in it."""
    root = destination.parent / f".{destination.name}.saving"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(root))
        except BlockingIOError:
            raise CheckpointError(f"{destination}: is being saved by another process") from None
        shutil.rmtree(root / "checkpoint", ignore_errors=True)
        (root / "checkpoint").mkdir()
        yield root / "checkpoint"


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {one_line(error)}"
