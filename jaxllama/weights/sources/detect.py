"""Which format a place holds, and its reader."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from jaxllama.errors import ConversionError, MissingExtraError
from jaxllama.weights.places import Place, PlaceLike, open_place
from jaxllama.weights.sources.safetensors import open_safetensors
from jaxllama.weights.sources.source import Source


def open_source(place: PlaceLike) -> Source:
    """Opens a folder of safetensors or a GGUF file and checks its headers.

    A folder with one GGUF file (or the parts of one) and no safetensors is that GGUF file, and a part is the whole.

    Raises: ConversionError naming the file, the tensor and the reason; ConfigError for an unsupported model;
        PlaceError where there is nothing.
    """
    opened = open_place(place)
    try:
        return _open(opened)
    except BaseException:
        opened.close()
        raise


def _open(place: Place) -> Source:
    if place.file is None:
        names = place.names()
        ggufs = [name for name in names if name.endswith(".gguf")]
        # Of a model in parts all have the same name but for the number.
        models = {re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"\1", name) for name in ggufs}
        if len(models) == 1 and not any(name.endswith(".safetensors") for name in names):
            return _open_gguf(place, ggufs[0])
        return open_safetensors(place)
    path, suffix = place / place.file, PurePosixPath(place.file).suffix
    if suffix == ".gguf":
        return _open_gguf(place, place.file)
    if suffix == ".safetensors":
        raise ConversionError(f"{path}: give the folder that holds it and config.json: {place}")
    if suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise ConversionError(
            f"{path}: pickled weights can run code and are never opened; convert them to safetensors first"
        )
    raise ConversionError(f"{path}: expected a folder of safetensors or a .gguf file")


def _open_gguf(place: Place, name: str) -> Source:
    try:
        from jaxllama.weights.sources.gguf import open_gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingExtraError("gguf", "gguf") from None
    return open_gguf(place, name)
