"""An adapter's files: what is there, what each tensor is, and the hashes that a checkpoint remembers.

Source: peft 0.21's utils/save_and_load.py for the names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxllama.errors import ConversionError, one_line
from jaxllama.system.hashing import hash_bytes
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.places import Place, PlaceLike, open_place
from jaxllama.weights.sources.adapters.settings import AdapterSettings, read_settings
from jaxllama.weights.sources.adapters.tensors import Factors
from jaxllama.weights.sources.safetensors import SIDECARS, read_header, read_small
from jaxllama.weights.sources.source import FLOATS, SourceFile, SourceTensor

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
# A module that is saved whole, and the weights below an adapter of its own, have these in their names.
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save|\.base_layer)?\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    `lora` has the parts of each module by their names (`lora_A.weight` …), `saved` the weights and biases that it
    has whole, by their names in the base. `problems` are tensors that are neither. `sidecars` are the files of its
    tokenizer, if it has one; `record` is what a checkpoint remembers.
    """

    where: str
    settings: AdapterSettings
    lora: Mapping[str, Mapping[str, SourceTensor]]
    saved: Mapping[str, SourceTensor]
    problems: tuple[str, ...]
    sidecars: Mapping[str, bytes]
    record: Mapping[str, Any]
    factors: Factors = field(default_factory=Factors, repr=False)


def open_adapter(place: PlaceLike) -> Adapter:
    """Opens an adapter of PEFT and checks its header; reads it once for its hash.

    Raises: ConversionError naming the file and the reason; PlaceError; StoreError.
    """
    # Whoever reads the weights later opens it again.
    with contextlib.closing(open_place(place)) as opened:
        return _open(opened)


def _open(place: Place) -> Adapter:
    if place.file is not None:
        raise ConversionError(f"{place / place.file}: give the folder that holds it and {CONFIG}: {place}")
    data = read_small(place, CONFIG)
    if data is None:
        raise ConversionError(f"{place}: has no {CONFIG}; expected the folder of an adapter of PEFT")
    settings = read_settings(parse_object(data, place / CONFIG, ConversionError), place / CONFIG)
    file = _open_weights(place)
    lora: dict[str, dict[str, SourceTensor]] = {}
    saved: dict[str, SourceTensor] = {}
    problems = []
    for key, tensor in read_header(file).items():
        name = key.removeprefix(_PREFIX)
        if name == key or tensor.dtype not in FLOATS:
            problems.append(f"unexpected {one_line(key, 120)} ({tensor.dtype})")
        elif found := _FACTOR.fullmatch(name):
            lora.setdefault(found["module"], {})[found["part"]] = tensor
        elif found := _SAVED.fullmatch(name):
            saved[f"{found['module']}.{found['kind']}"] = tensor
        else:
            problems.append(f"unexpected {one_line(key, 120)}")
    files = {
        CONFIG: {"size": len(data), "hash": hash_bytes(data)},
        file.name: {"size": file.size, "hash": file.hash()},
    }
    record = {"name": place.name, "base": settings.base, "files": files}
    return Adapter(place.where, settings, lora, saved, tuple(problems), _sidecars(place), record)


def _open_weights(place: Place) -> SourceFile:
    if place.stat(_WEIGHTS) is not None:
        return SourceFile(place, _WEIGHTS)
    for name in _PICKLED:
        if place.stat(name) is not None:
            raise ConversionError(
                f"{place / name}: pickled weights can run code and are never opened; save the adapter as {_WEIGHTS} "
                "(save_pretrained does it unless told otherwise)"
            )
    raise ConversionError(f"{place}: has no {_WEIGHTS}")


def _sidecars(place: Place) -> dict[str, bytes]:
    """All of the tokenizer's files, if the adapter has a tokenizer."""
    if not any(place.stat(name) is not None for name in _TOKENIZERS):
        return {}
    names = [name for name in SIDECARS if name != "generation_config.json"]
    return {name: data for name in names if (data := read_small(place, name)) is not None}
