"""Where models are: folders, the Hugging Face hub and buckets, all read by ranges of bytes. Nobody else opens either.

place.py        what a place is        local.py   a folder        hub.py    org/name[@revision][:file.gguf]
retries.py      reading on             bucket.py  gs://, s3://    http_ranges.py   ranges over HTTP
upload.py       writing a folder of a bucket: resumable, complete by its last file    lease.py   the lock of who writes
"""

from __future__ import annotations

import os
from pathlib import Path

from jaxllama.errors import PlaceError
from jaxllama.weights.places.bucket import SCHEMES, open_bucket
from jaxllama.weights.places.hub import is_hub_id, open_hub
from jaxllama.weights.places.local import LocalPlace
from jaxllama.weights.places.place import Place, PlaceFile

type PlaceLike = str | os.PathLike[str] | Place
"""A folder or file of this machine, `org/name[@revision][:file.gguf]` on the hub, `gs://…` or `s3://…`."""

PLACE_HELP = "a path, org/name[@revision][:file.gguf] on the Hugging Face hub, gs://bucket/path or s3://bucket/path"
MODEL_HELP = f"a checkpoint, a Hugging Face folder or a GGUF file: {PLACE_HELP}"
ADAPTER_HELP = (
    "a LoRA adapter of PEFT to merge into the weights: a folder, org/name on the hub, gs:// or s3://; repeat it for "
    "more, merged in order (default: none)"
)

__all__ = [
    "ADAPTER_HELP",
    "MODEL_HELP",
    "PLACE_HELP",
    "LocalPlace",
    "Place",
    "PlaceFile",
    "PlaceLike",
    "is_remote",
    "open_place",
    "short_name",
]


def open_place(place: PlaceLike, *, confined: bool = True) -> Place:
    """Opens what `place` names. What exists on this machine is never looked for elsewhere; a `Path` is always here.

    Raises: PlaceError saying where it was looked for; StoreError when a store fails.
    """
    if isinstance(place, Place):
        return place
    text = os.fspath(place)
    path = Path(text).expanduser().absolute()
    if not _has_scheme(text) and (path.exists() or path.is_symlink()):
        return LocalPlace(path, confined=confined)
    if not isinstance(place, str):
        raise PlaceError(f"{path}: does not exist")
    if _has_scheme(text):
        return open_bucket(text)
    if not is_hub_id(text):
        raise PlaceError(
            f"{text}: does not exist (looked for {path}), and it is no hub id (org/name, org/name@revision or "
            f"org/name:file.gguf) and no bucket ({', '.join(f'{scheme}://bucket/path' for scheme in SCHEMES)})"
        )
    try:
        return open_hub(text)
    except PlaceError as error:
        raise type(error)(f"{error} (on this machine there is no {path} either)") from None


def is_remote(place: PlaceLike) -> bool:
    """Whether `place` is not of this machine."""
    if isinstance(place, Place):
        return not isinstance(place, LocalPlace)
    text = os.fspath(place)
    return _has_scheme(text) or (isinstance(place, str) and not Path(text).expanduser().exists() and is_hub_id(text))


def short_name(place: PlaceLike) -> str:
    """What a model at `place` is called where nobody says otherwise: the hub's id, or the last part of a path."""
    if isinstance(place, Place):
        return place.name
    text = os.fspath(place)
    if _has_scheme(text):
        return text.rstrip("/").rpartition("/")[2]
    return text if is_remote(place) else Path(text).expanduser().resolve().name


def _has_scheme(text: str) -> bool:
    return "://" in text
