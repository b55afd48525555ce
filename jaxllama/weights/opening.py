"""A model from wherever and whatever it is: a checkpoint, a Hugging Face folder that is not converted, a GGUF file."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxllama.errors import ConfigError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import param_specs, stored_specs
from jaxllama.system.strict_json import parse_object
from jaxllama.text.chat import ChatTemplate, has_chat_template, load_chat_template
from jaxllama.text.encoding.tokenizer import Tokenizer, load_tokenizer
from jaxllama.weights.arrays.files import PARAMS, FileRecord
from jaxllama.weights.checkpoint import MANIFEST, Checkpoint, Manifest, read_configs, versions
from jaxllama.weights.places import Place, PlaceLike, is_remote, open_place, short_name
from jaxllama.weights.reading import CheckedReader, CheckpointReader, SourceReader, array_tensor
from jaxllama.weights.sources.adapters.merging import Merged, merge_adapters
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.source import Source, SourceFile
from jaxllama.weights.sources.stored import Pairs, Storage, default_dtype

logger = logging.getLogger("jaxllama")


def open_model(place: PlaceLike, adapters: Sequence[PlaceLike] = ()) -> Checkpoint:
    """Opens a model and checks everything but its weights, of which only the headers are read.

    A source that is not converted is what `convert` would make of it, its weights stay where they are. `adapters` of
    PEFT are merged into the weights, in order, while those are read.

    Raises: CheckpointError, ConversionError or ConfigError saying what is wrong with which file; PlaceError.
    """
    with contextlib.closing(open_place(place)) as opened:
        if _is_source(opened):
            return _as_checkpoint(open_source(opened), opened, adapters)
        checkpoint = Checkpoint.open(place)
        return _with_adapters(checkpoint, adapters) if adapters else checkpoint


def is_checkpoint(place: Place) -> bool:
    """Whether there is a checkpoint of ours. Some sources have a manifest.json of their own."""
    if place.file is not None or place.stat(MANIFEST) is None:
        return False
    return not any(name.endswith((".safetensors", ".gguf")) for name in place.names())


def load_text(checkpoint: Checkpoint) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The model's tokenizer and chat template, None where it has none.

    Raises: TokenizerError or ChatTemplateError.
    """
    if not any((checkpoint.path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None, None
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
    return tokenizer, load_chat_template(checkpoint.path) if has_chat_template(checkpoint.path) else None


def open_draft(place: PlaceLike, config: LlamaConfig, tokenizer: Tokenizer | None, model: PlaceLike) -> Checkpoint:
    """Opens the draft model of a model with `config` and `tokenizer`, which is at `model`.

    Raises: as `open_model`; ConfigError where its vocabulary is not the model's.
    """
    checkpoint = open_model(place)
    own, _ = load_text(checkpoint)
    names = f"the draft model {short_name(place)!r} has not the vocabulary of {short_name(model)!r}"
    if tokenizer is None or own is None:
        if checkpoint.config.vocab_size != config.vocab_size:
            raise ConfigError(f"{names}: {checkpoint.config.vocab_size:,} tokens, expected {config.vocab_size:,}")
        return checkpoint
    if own.vocab_size != tokenizer.vocab_size:
        raise ConfigError(f"{names}: {own.vocab_size:,} tokens, expected {tokenizer.vocab_size:,}")
    for token_id in range(own.vocab_size):
        mine, other = own.token_bytes(token_id), tokenizer.token_bytes(token_id)
        if mine != other:
            raise ConfigError(f"{names}: token {token_id} is {mine!r}, expected {other!r}")
    return checkpoint


def read_config(place: PlaceLike) -> LlamaConfig:
    """The config of a model, of which nothing else is read. Raises: as `open_model`."""
    with contextlib.closing(open_place(place)) as opened:
        data = None if opened.file else opened.read("config.json")
        if data is None:
            return LlamaConfig.from_hf(open_source(opened).config)
        return LlamaConfig.from_hf(parse_object(data, opened / "config.json", ConfigError))


def _is_source(place: Place) -> bool:
    if place.file is not None:
        return place.file != MANIFEST
    if place.stat(MANIFEST) is not None:
        return False
    names = place.names()
    return PARAMS not in names and any(name.endswith((".safetensors", ".gguf")) for name in names)


def _as_checkpoint(source: Source, place: Place, adapters: Sequence[PlaceLike]) -> Checkpoint:
    pairs = match_tensors(LlamaConfig.from_hf(source.config), source.tensors, source.name)
    # The hashes of the weights are not known, and tags of local files differ between hosts.
    remote = is_remote(place)
    stored: dict[str, Any] = {
        file.name: {"size": file.size, **({"tag": file.tag} if remote else {})} for file in source.files
    }
    provenance = {"kind": source.kind, "name": source.name, "files": stored}
    storage = Storage(default_dtype(pairs), None)
    return _read_through(merge_adapters(source, pairs, adapters), storage, provenance, place.num_readers)


def open_checkpoint_source(place: Place) -> tuple[Source, Pairs, Storage]:
    """A checkpoint as a source whose tensors are its arrays, and how those are stored; the manifest stands for its
    files. What is read is hashed.

    Raises: CheckpointError when it is damaged or of another version; PlaceError.
    """
    return _as_source(Checkpoint.open(place), CheckedReader)


def _with_adapters(checkpoint: Checkpoint, adapters: Sequence[PlaceLike]) -> Checkpoint:
    source, pairs, storage = _as_source(checkpoint, CheckpointReader)
    # The manifest's hash names all the rest.
    stored = {MANIFEST: asdict(FileRecord.of(checkpoint.manifest_bytes()))}
    provenance = {"kind": source.kind, "name": source.name, "files": stored}
    return _read_through(merge_adapters(source, pairs, adapters), storage, provenance, checkpoint.reader.num_readers)


def _as_source(checkpoint: Checkpoint, reader: type[CheckpointReader]) -> tuple[Source, Pairs, Storage]:
    path, place, manifest = checkpoint.path, checkpoint.place, checkpoint.manifest
    assert place is not None
    arrays = reader(place, manifest.files, manifest.quantize)
    specs = param_specs(checkpoint.config)
    with ThreadPoolExecutor(arrays.num_readers) as pool:
        arrays.prepare([part for spec in specs for part in stored_specs(spec, arrays.quantize)], pool)
    sidecars = {name: (path / name).read_bytes() for name in manifest.files if not name.startswith(f"{PARAMS}/")}
    source = Source(
        kind="jaxllama",
        name=place.name,
        config=parse_object(sidecars["config.json"], path / "config.json", ConfigError),
        tensors={},
        files=(SourceFile(place, MANIFEST),),
        sidecars=sidecars,
        check=arrays.check if isinstance(arrays, CheckedReader) else lambda: None,
    )
    pairs = tuple((spec, array_tensor(place, arrays, spec, checkpoint.dtype)) for spec in specs)
    return source, pairs, Storage(checkpoint.dtype, manifest.quantize)


def _read_through(merged: Merged, storage: Storage, provenance: Mapping[str, Any], num_readers: int) -> Checkpoint:
    """A checkpoint that is not there: its text in a folder that goes with it, its weights read from the source."""
    source = merged.source
    for warning in source.warnings:
        logger.warning("%s", warning)
    scratch = tempfile.TemporaryDirectory(prefix="jaxllama-", ignore_cleanup_errors=True)
    folder, files = Path(scratch.name), {}
    for name, data in source.sidecars.items():
        (folder / name).write_bytes(data)
        files[name] = FileRecord.of(data)
    config, generation_config = read_configs(folder)
    if merged.records:
        provenance = {**provenance, "adapters": list(merged.records)}
    return Checkpoint(
        folder,
        config,
        storage.dtype,
        generation_config,
        Manifest(storage.dtype, provenance, files, versions(), storage.quantize),
        SourceReader({spec.hf_key: tensor for spec, tensor in merged.pairs}, storage, num_readers),
        scratch=scratch,
    )
