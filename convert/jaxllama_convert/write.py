"""The conversion itself: check everything, then stream the tensors."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxllama.errors import CheckpointError, ConversionError, StoreError, quote
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import QUANTIZATIONS, num_params
from jaxllama.system.staging import check_apart, resolve_destination
from jaxllama.weights.arrays.files import FileRecord
from jaxllama.weights.arrays.writer import ParamsWriter
from jaxllama.weights.checkpoint import (
    DTYPES,
    Checkpoint,
    read_configs,
    versions,
)
from jaxllama.weights.opening import is_checkpoint, open_checkpoint_source
from jaxllama.weights.places import LocalPlace, PlaceLike, open_place
from jaxllama.weights.sources.adapters.merging import Merged, merge_adapters
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.quantized.interface import Int8Tensor
from jaxllama.weights.sources.source import FLOATS
from jaxllama.weights.sources.stored import Pairs, Storage, default_dtype
from jaxllama_convert.bucket_staging import BucketStaging, open_bucket_staging
from jaxllama_convert.copying import Copier
from jaxllama_convert.memory import peak_ram_bytes
from jaxllama_convert.staging import OutputError, Staging, open_staging
from jaxllama_convert.text_checks import check_chat_template, check_tokenizer

type Progress = Callable[[int, int, str], None]
"""Called with bytes written, bytes in all, and the tensor's name."""

MAX_IN_FLIGHT_BYTES = 2 * 2**30
"""What a conversion holds of weights at most, as `jaxllama.load`."""
MIN_IN_FLIGHT_BYTES = 8 * 2**20
# What a kill costs at most; each time the disk is waited for.
_RECORD_EVERY_S = 0.25
_LOCAL_IN_FLIGHT_BYTES = 80 * 2**20


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    `num_bytes` counts the tensors as written, `num_resumed` those that a former run had written. `path` is an address
    if it is in a bucket.
    """

    path: Path | str
    dtype: str
    quantize: str | None
    num_params: int
    num_bytes: int
    num_resumed: int
    seconds: float
    peak_ram_bytes: int
    warnings: tuple[str, ...]


def convert(
    src: PlaceLike,
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    force: bool = False,
    verify: bool = False,
    max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
    adapters: Sequence[PlaceLike] = (),
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a folder of safetensors or a GGUF file to a checkpoint that `jaxllama.load` reads.

    `src` is a path, `org/name[@revision][:file.gguf]` on the hub, or in a bucket (`gs://…`, `s3://…`). A checkpoint is
    copied, in another `dtype` or rounded if asked; int8 stays int8. Of other sources, `dtype` None keeps float32 if
    every matrix is float32 and means bfloat16 otherwise. `quantize` "int8" rounds the matrices, once they have that
    dtype, as `jaxllama.load` with `quantize` does: the same bits. `adapters` of PEFT, at places as `src`, are merged
    into the weights, in order: in float32, rounded once to what is stored.

    `dst` is a folder of this machine or of a bucket. It is no checkpoint before it is complete; a killed conversion
    resumes when it is started again. `force` replaces an existing checkpoint: in a folder that one stays until the new
    one is complete, in a bucket, which has no rename, it goes first. `verify` hashes the files again afterwards. At
    most `max_in_flight_bytes` of weights are in memory, or one piece of a tensor if that is larger.

    Raises: ConversionError or ConfigError for the source or the destination, PlaceError for a place that is not there
        or may not be used; OutputError when writing to a disk fails, StoreError when a store does.
    """
    started = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {quote(dtype)} is not supported, expected one of {', '.join(DTYPES)}")
    if quantize not in (None, *QUANTIZATIONS):
        raise ConversionError(f"quantize {quote(quantize)} is not supported, expected 'int8' or None")
    if max_in_flight_bytes < MIN_IN_FLIGHT_BYTES:
        raise ConversionError(
            f"max_in_flight_bytes must be at least {MIN_IN_FLIGHT_BYTES:,}, got {max_in_flight_bytes:,}"
        )
    is_bucket = "://" in os.fspath(dst)
    destination: Path | str = os.fspath(dst) if is_bucket else resolve_destination(dst, ConversionError)
    try:
        place = open_place(src)
        if isinstance(place, LocalPlace) and isinstance(destination, Path):
            check_apart(Path(place / place.file if place.file else place.where), destination, ConversionError)
        if is_checkpoint(place):
            source, pairs, storage = open_checkpoint_source(place)
        else:
            source = open_source(place)
            pairs, storage = (), None
    except OSError as error:
        raise ConversionError(f"{error.filename or src}: cannot be read ({error.strerror or error})") from None
    except RuntimeError as error:
        raise ConversionError(f"{src}: cannot be read ({error})") from None
    try:
        if storage is None:
            pairs = match_tensors(LlamaConfig.from_hf(source.config), source.tensors, source.name)
            storage = Storage(default_dtype(pairs), None)
        storage = Storage(dtype or storage.dtype, quantize or storage.quantize)
        merged = merge_adapters(source, pairs, adapters)
        config = LlamaConfig.from_hf(merged.source.config)
        with contextlib.ExitStack() as stack:
            staging: Staging | BucketStaging
            if isinstance(destination, Path):
                staging = stack.enter_context(open_staging(destination, force=force))
            else:
                staging = stack.enter_context(open_bucket_staging(destination, place, force=force))
            if not is_bucket and isinstance(place, LocalPlace):
                # No latency to hide: more only takes memory.
                max_in_flight_bytes = min(max_in_flight_bytes, _LOCAL_IN_FLIGHT_BYTES)
            job = _Job(merged, config, storage, staging, progress, max_in_flight_bytes)
            warnings = job.run()
    except OSError as error:
        raise OutputError(
            f"{error.filename or destination}: cannot be written ({error.strerror or error}). "
            "Run the same command again to resume"
        ) from error
    finally:
        source.close()
    if verify:
        _verify(destination, progress)
    return ConversionReport(
        destination,
        storage.dtype,
        storage.quantize,
        num_params(config),
        job.storage.num_bytes(merged.pairs),
        job.num_resumed,
        time.monotonic() - started,
        peak_ram_bytes(),
        warnings,
    )


def _verify(path: Path | str, progress: Progress | None) -> None:
    checkpoint = Checkpoint.open(path)
    try:
        checkpoint.verify(*([progress] if progress else []))
    except CheckpointError as error:
        raise OutputError(f"the checkpoint reads back wrong: {error}") from None


class _Job:
    def __init__(
        self,
        merged: Merged,
        config: LlamaConfig,
        storage: Storage,
        staging: Staging | BucketStaging,
        progress: Progress | None,
        max_in_flight_bytes: int,
    ) -> None:
        self.source = merged.source
        self.config = config
        self.pairs = merged.pairs
        self.adapters = merged.records
        self.storage = storage
        self.staging = staging
        self.progress = progress or (lambda done, total, name: None)
        self.max_in_flight_bytes = max_in_flight_bytes
        self.num_resumed = 0

    def run(self) -> tuple[str, ...]:
        """Writes everything and puts it in place. Returns the warnings."""
        warnings = [*self.source.warnings, *_precision_warnings(self.pairs, self.storage)]
        done = self.staging.begin(self._identity())
        folder = self.staging.texts
        for name, data in self.source.sidecars.items():
            (folder / name).write_bytes(data)
        read_configs(folder)
        check_tokenizer(folder, self.config.vocab_size, self.source.name)
        warnings += check_chat_template(folder)
        writer = ParamsWriter(self.staging.where, self.config, self.storage.dtype, self.storage.quantize)
        # Orbax takes as long to import as a gigabyte to convert; the disk is waited for meanwhile.
        threading.Thread(target=writer.prepare_commit).start()
        files = self._write_tensors(writer, done)
        self.source.check()
        source_hashes = {file.name: FileRecord(file.size, file.hash()) for file in self.source.files}
        files |= self._commit(writer)
        self._write_manifest(files, source_hashes)
        self.staging.finish()
        return tuple(warnings)

    def _write_tensors(
        self, writer: ParamsWriter, done: Mapping[str, Mapping[str, FileRecord]]
    ) -> dict[str, FileRecord]:
        files: dict[str, FileRecord] = {}
        todo = []
        for spec, tensor in self.pairs:
            if writer.is_staged(staged := done.get(spec.name, {})):
                files.update(staged)
            else:
                todo.append((spec, tensor))
        self.num_resumed = len(self.pairs) - len(todo)
        total = self.storage.num_bytes(self.pairs)
        written = total - self.storage.num_bytes(todo)
        self.staging.check_space(total - written)
        self.progress(written, total, "")
        copier = Copier(
            writer,
            self.storage,
            num_readers=max((file.place.num_readers for file in self.source.files), default=1),
            num_writers=self.staging.num_writers,
            max_in_flight_bytes=self.max_in_flight_bytes,
        )
        pending: dict[str, Mapping[str, FileRecord]] = {}
        recorded_s = -math.inf
        try:
            for copied in copier.copy(todo):
                self.progress(written, total, copied[0][0][0].name)
                for pair, records in copied:
                    pending[pair[0].name] = records
                    files.update(records)
                    written += self.storage.num_bytes([pair])
                if time.monotonic() - recorded_s > _RECORD_EVERY_S:
                    self.staging.record(pending)
                    pending, recorded_s = {}, time.monotonic()
        except BaseException as error:
            if not isinstance(error, StoreError):
                # The error is what matters, not that this fails too.
                with contextlib.suppress(OSError, StoreError):
                    self.staging.record(pending)
            raise
        self.staging.record(pending)
        self.progress(total, total, "")
        return files

    def _commit(self, writer: ParamsWriter) -> dict[str, FileRecord]:
        try:
            return writer.commit()
        except (ValueError, RuntimeError) as error:
            raise OutputError(f"{self.staging.texts}: Orbax cannot write its metadata ({error})") from error

    def _write_manifest(self, files: dict[str, FileRecord], source_hashes: Mapping[str, FileRecord]) -> None:
        source = {
            "kind": self.source.kind,
            "name": self.source.name,
            "files": {name: asdict(record) for name, record in source_hashes.items()},
            **({"adapters": list(self.adapters)} if self.adapters else {}),
        }
        self.staging.write_manifest(self.storage.dtype, self.storage.quantize, source, files)

    def _identity(self) -> dict[str, object]:
        files = [[file.name, file.size, file.tag] for file in self.source.files]
        sidecars = {name: hashlib.sha256(data).hexdigest() for name, data in self.source.sidecars.items()}
        return {
            **asdict(self.storage),
            "files": files,
            "sidecars": sidecars,
            "adapters": self.adapters,
            "versions": versions(),
        }


def _precision_warnings(pairs: Pairs, storage: Storage) -> list[str]:
    warnings = []
    matrices = [tensor for spec, tensor in pairs if len(spec.shape) > 1]
    # Taken as they are, or rounded to int8 from what they are.
    kept = [tensor for tensor in matrices if storage.quantize and isinstance(tensor, Int8Tensor)]
    narrowed = [tensor.dtype for tensor in matrices if tensor.dtype in ("F16", "F32") and tensor not in kept]
    if storage.dtype == "bfloat16" and narrowed:
        kinds = " and ".join(sorted(set(narrowed)))
        warnings.append(f"{len(narrowed)} matrices are {kinds}; bfloat16 keeps 8 bits of their mantissa")
    rounded = [t.dtype for t in matrices if t.dtype not in FLOATS and not isinstance(t, Int8Tensor)]
    if storage.quantize and rounded:
        kinds = " and ".join(sorted(set(rounded)))
        warnings.append(f"{len(rounded)} matrices are {kinds}; {storage.quantize} rounds them a second time")
    return warnings
