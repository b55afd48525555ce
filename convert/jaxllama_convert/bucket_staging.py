"""A conversion into a bucket. What is unfinished lies there too, as `weights/places/upload.py` says.

On the disk are config and tokenizer files, in a temporary folder, and Orbax's metadata for a moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxllama.errors import ConversionError
from jaxllama.weights.arrays.files import PARAMS, FileRecord
from jaxllama.weights.checkpoint import MANIFEST, Manifest, versions
from jaxllama.weights.places import Place
from jaxllama.weights.places.bucket import open_bucket
from jaxllama.weights.places.upload import Upload, open_upload
from jaxllama.weights.sources.safetensors import SIDECARS


class BucketStaging:
    """What `Staging` is for a folder. Make one with `open_bucket_staging`."""

    def __init__(self, upload: Upload, texts: Path) -> None:
        self.where: Upload | Path = upload
        self.texts = texts
        self.num_writers = upload.num_writers
        self._upload = upload
        self._manifest = b""

    def begin(self, identity: Mapping[str, Any]) -> dict[str, dict[str, FileRecord]]:
        """As `Staging.begin`."""
        done = self._upload.begin(identity)
        return {step: {name: FileRecord(**record) for name, record in files.items()} for step, files in done.items()}

    def check_space(self, num_bytes: int) -> None:
        """A bucket has no end."""

    def record(self, tensors: Mapping[str, Mapping[str, FileRecord]]) -> None:
        """Notes that the objects of these tensors are there."""
        for name, files in tensors.items():
            self._upload.record(name, files, {key: asdict(value) for key, value in files.items()})

    def write_manifest(
        self, dtype: str, quantize: str | None, source: Mapping[str, Any], files: Mapping[str, FileRecord]
    ) -> None:
        """Writes the texts; the manifest itself is written by `finish`."""
        records = dict(files)
        for path in sorted(self.texts.iterdir()):
            data = path.read_bytes()
            self._upload.write(path.name, data)
            records[path.name] = FileRecord.of(data)
        self._manifest = Manifest(dtype, source, records, versions(), quantize).to_json().encode()

    def finish(self) -> None:
        """Checks every object, removes what is left of a checkpoint that was there before, and writes the manifest."""
        texts = ("config.json", *SIDECARS)
        self._upload.finish(self._manifest, owns=lambda name: name.startswith(f"{PARAMS}/") or name in texts)


@contextlib.contextmanager
def open_bucket_staging(url: str, source: Place, *, force: bool) -> Iterator[BucketStaging]:
    """Locks the folder of a bucket that `url` names.

    Raises: ConversionError for a folder inside the source's or around it; as `open_upload`.
    """
    place = open_bucket(url)
    here, there = f"{place}/", f"{source / source.file if source.file else source}/"
    if here.startswith(there):
        raise ConversionError(f"{place}: is inside the source {source}, which stays as it is; choose another folder")
    if there.startswith(here):
        raise ConversionError(f"{place}: holds the source {source}; choose another folder")
    with open_upload(place, MANIFEST, force=force) as upload, TemporaryDirectory(prefix="jaxllama-") as texts:
        yield BucketStaging(upload, Path(texts))
