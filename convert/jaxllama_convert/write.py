"""The conversion itself: check everything, then stream the tensors one by one."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxllama.errors import CheckpointError, ConversionError, quote
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import QUANTIZATIONS, ParamSpec, QuantizedWeight, num_params
from jaxllama.system.staging import check_apart, resolve_destination
from jaxllama.weights.checkpoint import (
    DTYPES,
    Checkpoint,
    FileRecord,
    ParamsWriter,
    read_configs,
    versions,
    write_manifest,
)
from jaxllama.weights.places import LocalPlace, PlaceLike, open_place
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.quantized.interface import Int8Tensor
from jaxllama.weights.sources.source import FLOATS, Source, SourceTensor
from jaxllama.weights.sources.stored import Pairs, Storage, default_dtype, read_rounded, read_stored
from jaxllama_convert.memory import peak_ram_bytes
from jaxllama_convert.staging import OutputError, Staging, open_staging
from jaxllama_convert.text_checks import check_chat_template, check_tokenizer

type Progress = Callable[[int, int, str], None]
"""Called with bytes written, bytes in all, and the tensor's name."""

type Weight = np.ndarray | QuantizedWeight

# Elements converted at a time: what is in memory beyond the tensors themselves is a few times 16 MB.
_SLICE_ELEMENTS = 4 * 2**20
_COPY_COMMANDS = {"gs://": "gcloud storage cp -r", "s3://": "aws s3 cp --recursive"}
# Metadata and rounding of the file system, beyond the tensors.
_SPARE_DISK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    `num_bytes` counts the tensors as written, `num_resumed` those that a former run had written.
    """

    path: Path
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
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a folder of safetensors or a GGUF file to a checkpoint that `jaxllama.load` reads.

    `src` is a path, `org/name[@revision][:file.gguf]` on the hub, or in a bucket (`gs://…`, `s3://…`).
    `dtype` None keeps float32 if every matrix of the source is float32 and means bfloat16 otherwise. `quantize` "int8"
    rounds the matrices, once they have that dtype, as `jaxllama.load` with `quantize` does: the same bits. At most two
    tensors are in memory. Nothing appears at `dst` before it is complete; a killed conversion resumes when it is
    started again. `force` replaces an existing checkpoint, which stays until the new one is complete. `verify` hashes
    the files again afterwards.

    Raises: ConversionError or ConfigError for the source or the destination, PlaceError for a source that is not there
        or may not be read; OutputError when writing fails, StoreError when reading does.
    """
    started = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {quote(dtype)} is not supported, expected one of {', '.join(DTYPES)}")
    if quantize not in (None, *QUANTIZATIONS):
        raise ConversionError(f"quantize {quote(quantize)} is not supported, expected 'int8' or None")
    if (url := os.fspath(dst)).startswith(tuple(_COPY_COMMANDS)):
        command = next(command for scheme, command in _COPY_COMMANDS.items() if url.startswith(scheme))
        raise ConversionError(
            f"{url}: conversions write to folders of this machine. Convert to one, then: {command} FOLDER {url}. "
            "Or serve the source as it is, which needs no conversion"
        )
    try:
        destination, place = resolve_destination(dst, ConversionError), open_place(src)
        if isinstance(place, LocalPlace):
            check_apart(Path(place / place.file if place.file else place.where), destination, ConversionError)
        source = open_source(place)
    except OSError as error:
        raise ConversionError(f"{error.filename or src}: cannot be read ({error.strerror or error})") from None
    except RuntimeError as error:
        raise ConversionError(f"{src}: cannot be read ({error})") from None
    try:
        config = LlamaConfig.from_hf(source.config)
        pairs = match_tensors(config, source.tensors, source.name)
        dtype = dtype or default_dtype(pairs)
        with open_staging(destination, force=force) as staging:
            job = _Job(source, config, pairs, Storage(dtype, quantize), staging, progress)
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
        dtype,
        quantize,
        num_params(config),
        job.storage.num_bytes(pairs),
        job.num_resumed,
        time.monotonic() - started,
        peak_ram_bytes(),
        warnings,
    )


def _verify(path: Path, progress: Progress | None) -> None:
    checkpoint = Checkpoint.open(path)
    try:
        checkpoint.verify(*([progress] if progress else []))
    except CheckpointError as error:
        raise OutputError(f"the checkpoint reads back wrong: {error}") from None


class _Job:
    def __init__(
        self,
        source: Source,
        config: LlamaConfig,
        pairs: Pairs,
        storage: Storage,
        staging: Staging,
        progress: Progress | None,
    ) -> None:
        self.source = source
        self.config = config
        self.pairs = pairs
        self.storage = storage
        self.staging = staging
        self.progress = progress or (lambda done, total, name: None)
        self.num_resumed = 0

    def run(self) -> tuple[str, ...]:
        """Writes everything and puts it in place. Returns the warnings."""
        warnings = [*self.source.warnings, *_precision_warnings(self.pairs, self.storage)]
        done = self.staging.begin(self._identity())
        folder = self.staging.checkpoint
        for name, data in self.source.sidecars.items():
            (folder / name).write_bytes(data)
        read_configs(folder)
        check_tokenizer(folder, self.config.vocab_size, self.source.name)
        warnings += check_chat_template(folder)
        writer = ParamsWriter(folder, self.config, self.storage.dtype, self.storage.quantize)
        files = self._write_tensors(writer, done)
        source_hashes = {file.name: FileRecord(file.size, file.sha256()) for file in self.source.files}
        self._commit(writer)
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
        _check_space(self.staging.root, total - written)
        for pair, weight in _read_ahead(todo, self.storage):
            self.progress(written, total, pair[0].name)
            records = writer.write(pair[0], weight)
            self.staging.record(pair[0].name, records)
            files.update(records)
            written += self.storage.num_bytes([pair])
        self.progress(total, total, "")
        return files

    def _commit(self, writer: ParamsWriter) -> None:
        try:
            writer.commit()
        except (ValueError, RuntimeError) as error:
            raise OutputError(f"{self.staging.checkpoint}: Orbax cannot write its metadata ({error})") from error

    def _write_manifest(self, files: dict[str, FileRecord], source_hashes: Mapping[str, FileRecord]) -> None:
        source = {
            "kind": self.source.kind,
            "name": self.source.name,
            "files": {name: asdict(record) for name, record in source_hashes.items()},
        }
        write_manifest(self.staging.checkpoint, self.storage.dtype, self.storage.quantize, source, files)

    def _identity(self) -> dict[str, object]:
        files = [[file.name, file.size, file.tag] for file in self.source.files]
        sidecars = {name: hashlib.sha256(data).hexdigest() for name, data in self.source.sidecars.items()}
        return {**asdict(self.storage), "files": files, "sidecars": sidecars, "versions": versions()}


def _read_ahead(pairs: Pairs, storage: Storage) -> Iterator[tuple[tuple[ParamSpec, SourceTensor], Weight]]:
    """Every tensor in turn, the next one being read while the caller writes: two in memory, never three."""
    with ThreadPoolExecutor(1) as reader:
        future = reader.submit(_read_tensor, *pairs[0], storage) if pairs else None
        for index, pair in enumerate(pairs):
            assert future is not None
            weight = future.result()
            future = reader.submit(_read_tensor, *pairs[index + 1], storage) if index + 1 < len(pairs) else None
            yield pair, weight
            del weight


def _read_tensor(spec: ParamSpec, tensor: SourceTensor, storage: Storage) -> Weight:
    """The whole tensor as it is stored, converted in slices.

    Raises: ConversionError when it has a NaN, an infinity, or a value that the dtype cannot hold.
    """
    dtype = storage.numpy_dtype
    row_elements = math.prod(tensor.shape[1:])
    step = max(1, _SLICE_ELEMENTS // (row_elements * tensor.row_multiple)) * tensor.row_multiple
    slices = [(start, min(start + step, tensor.shape[0])) for start in range(0, tensor.shape[0], step)]
    if storage.is_quantized(spec):
        weight = QuantizedWeight(np.empty(tensor.shape, np.int8), np.empty(tensor.shape[0], np.float32))
        for start, stop in slices:
            rows = read_rounded(tensor, start, stop, dtype, hashed=True)
            weight.values[start:stop], weight.scale[start:stop] = rows
        return weight
    whole = np.empty(tensor.shape, dtype)
    for start, stop in slices:
        whole[start:stop] = read_stored(tensor, start, stop, dtype, hashed=True)
    return whole


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


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_DISK_BYTES:
        raise OutputError(
            f"{folder.parent}: {num_bytes + _SPARE_DISK_BYTES:,} bytes are needed, {free:,} are free. "
            "Free some and run the same command again"
        )
