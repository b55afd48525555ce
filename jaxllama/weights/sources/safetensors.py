"""Reads a Hugging Face folder: config.json, safetensors (one file, or shards with an index) and tokenizer files.

Source: the safetensors format description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllama.errors import ConfigError, ConversionError, PlaceError, StoreError, listed, one_line, quote
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.places import Place
from jaxllama.weights.sources.config_keys import unknown_key_warnings
from jaxllama.weights.sources.quantized.methods import QUANTIZATION_CONFIG, dequantized
from jaxllama.weights.sources.source import Source, SourceFile, SourceTensor

SIDECARS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_NAME = 255  # of a file on nearly every system
_MAX_HEADER_BYTES = 100_000_000
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEMSIZE |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


def open_safetensors(folder: Place) -> Source:
    """Opens a folder and checks the header of every shard.

    Raises: ConversionError naming the file, the tensor and the reason.
    """
    config_bytes = read_small(folder, "config.json")
    if config_bytes is None:
        raise ConversionError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    config = parse_object(config_bytes, folder / "config.json", ConfigError)
    weight_map = _weight_map(folder)
    files = tuple(SourceFile(folder, checked_name(folder, name)) for name in sorted(set(weight_map.values())))
    headers = {file.name: read_header(file) for file in files}
    _check_index(folder, weight_map, headers)
    sidecars = {name: data for name in SIDECARS if (data := read_small(folder, name)) is not None}
    if "generation_config.json" in sidecars:
        parse_object(sidecars["generation_config.json"], folder / "generation_config.json", ConversionError)
    warnings = unknown_key_warnings(config)
    if not {"tokenizer.json", "tokenizer.model"} & set(sidecars):
        warnings.append(f"{folder}: has no tokenizer.json or tokenizer.model; the checkpoint will take token ids only")
    tensors = dequantized(config, {name: tensor for header in headers.values() for name, tensor in header.items()})
    if config.get(QUANTIZATION_CONFIG):
        # What is read here is not quantised any more, and config.json goes into the checkpoint.
        del config[QUANTIZATION_CONFIG]
        config_bytes = (json.dumps(config, indent=2) + "\n").encode()
    return Source(
        kind="safetensors",
        name=folder.name,
        config=config,
        tensors=tensors,
        files=files,
        sidecars={"config.json": config_bytes, **sidecars},
        warnings=tuple(warnings),
    )


def read_small(folder: Place, name: str) -> bytes | None:
    """The bytes of a small file of the folder, None if it is not there.

    Raises: ConversionError when it is unreadable, too large or leads out of the folder.
    """
    try:
        return folder.read(checked_name(folder, name))
    except StoreError:
        raise
    except PlaceError as error:
        raise ConversionError(str(error)) from None


def checked_name(folder: Place, name: str) -> str:
    """`name`, which must be that of a file in the folder itself.

    Raises: ConversionError.
    """
    if not name or name in (".", "..") or any(char in name for char in "/\\\0"):
        raise ConversionError(f"{folder}: file name {quote(name)} must be a name without folders")
    if len(name) > _MAX_NAME:
        raise ConversionError(
            f"{folder}: file name {quote(name)} has {len(name)} characters, expected {_MAX_NAME} at most"
        )
    return name


def read_header(file: SourceFile) -> dict[str, SourceTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises: ConversionError for a header that breaks the format in any way.
    """
    where = file.path
    if file.size < 8:
        raise ConversionError(f"{where}: {file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read_hashed(0, 8).tobytes(), "little")
    if length > _MAX_HEADER_BYTES or 8 + length > file.size:
        raise ConversionError(
            f"{where}: header length {length} exceeds the file ({file.size} bytes) or {_MAX_HEADER_BYTES}"
        )
    header = parse_object(file.read_hashed(8, length).tobytes(), f"{where}: header", ConversionError)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConversionError(f"{where}: header: __metadata__ must map names to texts, got {quote(metadata)}")
    if not header:
        raise ConversionError(f"{where}: header: has no tensors")
    tensors = [_entry(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise ConversionError(
                f"{where}: {quote(tensor.name)} {kind} (it starts at byte {tensor.offset}, expected {end})"
            )
        end += tensor.num_bytes
    if end != file.size:
        raise ConversionError(
            f"{where}: tensors end at byte {end} but the file has {file.size}. Was the download complete?"
        )
    return {tensor.name: tensor for tensor in tensors}


def _entry(file: SourceFile, name: str, entry: Any, data_start: int) -> SourceTensor:
    where = f"{file.path}: {quote(name)}"
    if not name or ".." in name or any(ord(char) < 32 or char in "/\\" for char in name):
        raise ConversionError(f"{where} is not a tensor name that can be used safely")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{where} must have dtype, shape and data_offsets, got {quote(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
        raise ConversionError(f"{where} has unknown dtype {quote(dtype)}")
    if not _naturals(shape) or len(shape) > 8:
        raise ConversionError(f"{where} has a malformed shape {quote(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConversionError(f"{where} has malformed data_offsets {quote(offsets)}")
    if data_start + offsets[1] > file.size:
        raise ConversionError(
            f"{where} ends at byte {data_start + offsets[1]} but the file has {file.size}. Was the download complete?"
        )
    want = math.prod(shape) * _ITEMSIZE[dtype]
    if offsets[1] - offsets[0] != want:
        raise ConversionError(f"{where} has {offsets[1] - offsets[0]} bytes, expected {want} for {dtype} {shape}")
    return SourceTensor(name, file, data_start + offsets[0], want, tuple(shape), dtype)


def _naturals(value: Any) -> bool:
    # Python's integers do not overflow, so a bound on each is about sanity, not safety.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _weight_map(folder: Place) -> dict[str, str]:
    """Tensor name to file name; for a single file, that file under the empty name."""
    index = read_small(folder, _INDEX)
    names = [name for name in folder.names() if name.endswith(".safetensors")]
    if index is None:
        if _SINGLE in names:
            return {"": _SINGLE}
        if len(names) == 1:
            return {"": names[0]}
        if names:
            raise ConversionError(
                f"{folder}: has {len(names)} safetensors files but no {_INDEX}, so their roles are unknown"
            )
        pickles = [name for name in folder.names() if name.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise ConversionError(
                f"{folder}: has only pickled weights ({pickles[0]}), which can run code and are never opened; "
                "convert them to safetensors first"
            )
        raise ConversionError(f"{folder}: has no safetensors files")
    weight_map = parse_object(index, folder / _INDEX, ConversionError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConversionError(f"{folder / _INDEX}: weight_map must map tensor names to file names")
    if _SINGLE in names and _SINGLE not in weight_map.values():
        raise ConversionError(
            f"{folder}: has both {_SINGLE} and {_INDEX}, which does not mention it; remove one of them"
        )
    return weight_map


def _check_index(
    folder: Place, weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, SourceTensor]]
) -> None:
    problems = [] if "" in weight_map else list(_index_problems(weight_map, headers))
    if problems:
        raise ConversionError(f"{folder / _INDEX}: {listed(problems)}")


def _index_problems(weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, SourceTensor]]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for file_name, header in headers.items():
        for name in header:
            found.setdefault(name, []).append(file_name)
    for name, file_name in weight_map.items():
        if file_name not in found.get(name, []):
            yield f"{quote(name)} is not in {one_line(file_name, 80)}"
    for name, file_names in found.items():
        if len(file_names) > 1:
            yield f"{quote(name)} is in several files: {listed(file_names)}"
        elif name not in weight_map:
            yield f"{quote(name)} of {file_names[0]} is not in the index"
