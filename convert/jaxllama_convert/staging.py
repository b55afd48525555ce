"""Where a conversion lives until it is complete, so that a kill at any moment costs nothing but time.

.NAME.partial/       beside DST
    lock             held by the process that writes
    partial.json     which source and dtype this is; another one starts over
    journal.jsonl    one line per tensor that is safely on disk, with the hashes of its files
    checkpoint/      becomes DST by one rename, when its manifest is written
    old/             the checkpoint that --force replaces, until then
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxllama.errors import ConversionError
from jaxllama.system.staging import check_replaceable, is_ours, locked_folder, put_in_place
from jaxllama.weights.arrays.files import FileRecord
from jaxllama.weights.checkpoint import FORMAT, MANIFEST, write_manifest
from jaxllama.weights.places.upload import Upload

_PARTIAL_FORMAT = "jaxllama-partial"
# Files that wait for the disk at a time: many share one commit of the file system's journal.
_NUM_WRITERS = 16
# Metadata and rounding of the file system, beyond the tensors.
_SPARE_DISK_BYTES = 16 * 2**20


class OutputError(ConversionError):
    """The checkpoint cannot be written, through no fault of the source: disk full, no permission, in use.

    **What to do:** free the disk, or wait for the other conversion, and run the same command again: it goes on after
    the last whole tensor. To give up, delete the folder `.NAME.partial` beside the checkpoint's.
    """


class Staging:
    """The partial folder of one destination, locked. Make one with `open_staging`."""

    def __init__(self, root: Path, destination: Path) -> None:
        self.root = root
        self.destination = destination
        self.checkpoint = root / "checkpoint"
        self.where: Path | Upload = self.checkpoint
        self.texts = self.checkpoint
        self.num_writers = _NUM_WRITERS
        self._old = root / "old"
        self._journal = root / "journal.jsonl"
        self._marker = root / "partial.json"
        self._is_finished = False

    def begin(self, identity: Mapping[str, Any]) -> dict[str, dict[str, FileRecord]]:
        """Starts or resumes; returns the files of every tensor that is already written, by the tensor's name."""
        wanted = json.dumps({"format": _PARTIAL_FORMAT, **identity}, sort_keys=True)
        if not self._marker.exists() or self._marker.read_text() != wanted:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            self._journal.unlink(missing_ok=True)
            self._marker.write_text(wanted)
        self.checkpoint.mkdir(exist_ok=True)
        (self.checkpoint / MANIFEST).unlink(missing_ok=True)
        return self._read_journal()

    def check_space(self, num_bytes: int) -> None:
        """Raises: OutputError when the disk has not that much."""
        free = shutil.disk_usage(self.root).free
        if free < num_bytes + _SPARE_DISK_BYTES:
            raise OutputError(
                f"{self.root.parent}: {num_bytes + _SPARE_DISK_BYTES:,} bytes are needed, {free:,} are free. "
                "Free some and run the same command again"
            )

    def record(self, tensors: Mapping[str, Mapping[str, FileRecord]]) -> None:
        """Notes that the files of these tensors are on disk."""
        try:
            with self._journal.open("a") as file:
                for name, files in tensors.items():
                    records = {key: asdict(value) for key, value in files.items()}
                    file.write(json.dumps({"name": name, "files": records}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self._journal)
            raise

    def write_manifest(
        self, dtype: str, quantize: str | None, source: Mapping[str, Any], files: Mapping[str, FileRecord]
    ) -> None:
        """Completes the checkpoint, which `finish` puts in its place."""
        write_manifest(self.checkpoint, dtype, quantize, source, files)

    def holds_work(self) -> bool:
        """Whether the folder has anything that the next run would miss."""
        return not self._is_finished and (self._journal.exists() or self._old.exists())

    def finish(self) -> None:
        """Puts the complete checkpoint in its place; the partial folder goes at the end of `open_staging`."""
        put_in_place(self.checkpoint, self.destination, old=self._old)
        self._is_finished = True

    def recover(self) -> None:
        """Undoes a `finish` that was killed between its renames; cleans up after one killed behind them."""
        if self._old.exists():
            if not self.destination.exists():
                os.rename(self._old, self.destination)
            else:
                for path in (self._old, self.checkpoint):
                    shutil.rmtree(path, ignore_errors=True)
                for path in (self._journal, self._marker):
                    path.unlink(missing_ok=True)

    def _read_journal(self) -> dict[str, dict[str, FileRecord]]:
        done = {}
        for line in self._journal.read_text().splitlines() if self._journal.exists() else ():
            # The last line is torn if the process was killed while it wrote it.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                done[entry["name"]] = {name: FileRecord(**record) for name, record in entry["files"].items()}
        return done


@contextlib.contextmanager
def open_staging(destination: Path, *, force: bool) -> Iterator[Staging]:
    """Locks the partial folder of `destination`, after checking that the destination may be written.

    The folder stays when the body fails, for the next run to resume; it goes if no tensor was written.

    Raises: ConversionError when the destination exists and may not be replaced; OutputError when it is in use.
    """
    # Before anything is made, and again under the lock, when a killed conversion's renames are undone.
    _check_destination(destination, force)
    root = destination.parent / f".{destination.name}.partial"
    if not is_ours(root):
        raise ConversionError(f"{root}: is in the way and not the converter's; move it")
    staging = Staging(root, destination)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(root, keep=staging.holds_work))
        except BlockingIOError:
            raise OutputError(f"{destination}: another conversion is writing it") from None
        staging.recover()
        _check_destination(destination, force)
        yield staging


def _check_destination(destination: Path, force: bool) -> None:
    expected = "is not a jaxllama checkpoint"
    check_replaceable(destination, ConversionError, is_known=_is_checkpoint, expected=expected, force=force)


def _is_checkpoint(folder: Path) -> bool:
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT
