"""A model from wherever and whatever it is: a checkpoint, a Hugging Face folder that is not converted, a GGUF file."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import Any

from jaxllama.errors import ConfigError
from jaxllama.model.config import LlamaConfig
from jaxllama.system.strict_json import parse_object
from jaxllama.text.chat import ChatTemplate, has_chat_template, load_chat_template
from jaxllama.text.encoding.tokenizer import Tokenizer, load_tokenizer
from jaxllama.weights.arrays.files import PARAMS, FileRecord
from jaxllama.weights.checkpoint import MANIFEST, Checkpoint, Manifest, read_configs, versions
from jaxllama.weights.places import Place, PlaceLike, is_remote, open_place
from jaxllama.weights.reading import SourceReader
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.source import Source
from jaxllama.weights.sources.stored import Storage, default_dtype

logger = logging.getLogger("jaxllama")


def open_model(place: PlaceLike) -> Checkpoint:
    """Opens a model and checks everything but its weights, of which only the headers are read.

    A source that is not converted is what `convert` would make of it, its weights stay where they are.

    Raises: CheckpointError, ConversionError or ConfigError saying what is wrong with which file; PlaceError.
    """
    with contextlib.closing(open_place(place)) as opened:
        if not _is_source(opened):
            return Checkpoint.open(place)
        return _as_checkpoint(open_source(opened), opened)


def load_text(checkpoint: Checkpoint) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The model's tokenizer and chat template, None where it has none.

    Raises: TokenizerError or ChatTemplateError.
    """
    if not any((checkpoint.path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None, None
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
    return tokenizer, load_chat_template(checkpoint.path) if has_chat_template(checkpoint.path) else None


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


def _as_checkpoint(source: Source, place: Place) -> Checkpoint:
    config = LlamaConfig.from_hf(source.config)
    pairs = match_tensors(config, source.tensors, source.name)
    storage = Storage(default_dtype(pairs), None)
    for warning in source.warnings:
        logger.warning("%s", warning)
    scratch = tempfile.TemporaryDirectory(prefix="jaxllama-", ignore_cleanup_errors=True)
    folder, files = Path(scratch.name), {}
    for name, data in source.sidecars.items():
        (folder / name).write_bytes(data)
        files[name] = FileRecord.of(data)
    config, generation_config = read_configs(folder)
    # The hashes of the weights are not known, and tags of local files differ between hosts.
    remote = is_remote(place)
    stored: dict[str, Any] = {
        file.name: {"size": file.size, **({"tag": file.tag} if remote else {})} for file in source.files
    }
    provenance = {"kind": source.kind, "name": source.name, "files": stored}
    manifest = Manifest(storage.dtype, provenance, files, versions())
    tensors = {spec.hf_key: tensor for spec, tensor in pairs}
    return Checkpoint(
        folder,
        config,
        storage.dtype,
        generation_config,
        manifest,
        SourceReader(tensors, storage, place.num_readers),
        scratch=scratch,
    )
