"""Writing a folder of a bucket, which has no rename: it is complete when its last file is there, and that comes last.

DST/.partial/lock            held by the process that writes (lease.py)
DST/.partial/partial.json    what is being made; to make something else starts over
DST/.partial/done/STEP.json  a step whose objects are all there: their sizes and ETags, and a note
DST/LAST                     put if there is none; then `.partial` goes

All of it is in the bucket, so whoever starts the same work again, on any machine, resumes it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxllama.errors import PlaceError, StoreError, listed
from jaxllama.weights.places.bucket import BucketPlace, Bytes, open_bucket
from jaxllama.weights.places.lease import Lease, take_lease
from jaxllama.weights.places.place import PlaceFile

INCOMPLETE = b'{"format": "jaxllama-incomplete"}\n'
"""Stands in the last file's place when work that another process began is started over: should that process come back
and write its own last file, there is one."""

_PARTIAL = ".partial/"
_LOCK = f"{_PARTIAL}lock"
_MARKER = f"{_PARTIAL}partial.json"
_DONE = f"{_PARTIAL}done/"
_FORCE = "give --force to replace it"


class Upload:
    """An unfinished folder in a bucket, locked. Make one with `open_upload`; threads may share it."""

    def __init__(self, place: BucketPlace, last: str, lease: Lease) -> None:
        self.place = place
        self.num_writers = place.num_readers
        self._last = last
        self._lease = lease
        self._written: dict[str, PlaceFile] = {}

    def begin(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Starts or resumes; returns the notes of the steps whose objects are all there, as they were written.

        `identity` says what is made: JSON. What was begun with another is removed.

        Raises: StoreError, PlaceError.
        """
        wanted = json.dumps(identity, sort_keys=True).encode()
        marker = self.place.current(_MARKER)
        names = [name for name in self.place.all_names() if name.startswith(_DONE)]
        with ThreadPoolExecutor(self.num_writers) as pool:
            if marker is None or marker[0] != wanted:
                list(pool.map(self.place.delete, names))
                names = []
                self.place.put(_MARKER, wanted)
                if self._lease.was_taken_over:
                    self.place.create(self._last, INCOMPLETE)
            found = self.place.current(self._last)
            if found is not None and found[0] != INCOMPLETE:
                self.place.delete(self._last)
            steps = [step for step in pool.map(self._read_step, names) if step is not None]
        for _, files, _ in steps:
            self._written |= files
        return {name: note for name, _, note in steps}

    def write(self, name: str, data: Bytes) -> PlaceFile:
        """Writes an object of at most some 100 MB over what is there, and checks that it has arrived.

        Raises: StoreError.
        """
        self._lease.check()
        self._written[name] = file = self.place.write(name, data)
        return file

    def write_parts(self, name: str, parts: Iterable[Bytes]) -> PlaceFile:
        """Writes a large object, part by part; see `BucketPlace.write_parts`. Raises: StoreError."""
        self._lease.check()
        self._written[name] = file = self.place.write_parts(name, parts)
        return file

    def add(self, sizes: Mapping[str, int]) -> None:
        """Counts objects as written that other processes of this work wrote. Raises: StoreError for other sizes."""
        self.place.forget()
        for name, size in sizes.items():
            file = self.place.stat(name)
            if file is None or file.size != size:
                got = "is missing" if file is None else f"has {file.size} bytes"
                raise StoreError(f"{self.place / name}: {got}, expected {size}")
            self._written[name] = file

    def record(self, step: str, names: Iterable[str], note: Any = None) -> None:
        """Notes that a step's objects `names` are written. `note` is JSON, which `begin` gives back.

        Raises: StoreError.
        """
        self._lease.check()
        files = {name: [self._written[name].size, self._written[name].tag] for name in names}
        self.place.put(f"{_DONE}{step}.json", json.dumps({"step": step, "files": files, "note": note}).encode())

    def finish(self, data: bytes, *, owns: Callable[[str], bool] = lambda name: False) -> None:
        """Checks that every object is as it was written, removes others that it `owns`, then writes the last file.

        Raises: StoreError when one has changed or gone, or when another process has finished before.
        """
        self._lease.renew()
        self.place.forget()
        problems = [self._problem(file) for file in self._written.values()]
        if any(problems):
            raise StoreError(f"{self.place}: {listed([p for p in problems if p])}. Run the same command again")
        with ThreadPoolExecutor(self.num_writers) as pool:
            others = {name for name in self.place.all_names() if owns(name)} - {*self._written, self._last}
            list(pool.map(self.place.delete, sorted(others)))
        self._lease.renew()
        found = self.place.current(self._last)
        if found is not None and found[0] == INCOMPLETE:
            done = self.place.replace(self._last, data, found[1])
        else:
            done = self.place.create(self._last, data)
        if done is None:
            raise StoreError(f"{self.place / self._last}: another process has written it")
        if (found := self.place.current(self._last)) is None or found[0] != data:
            self.place.delete(self._last)
            raise StoreError(f"{self.place / self._last}: reads back other than it was written")
        # What it would cost to fail here is some small objects, which the next one removes.
        with contextlib.suppress(PlaceError):
            self.clean()

    def clean(self) -> None:
        """Removes what only the unfinished work needs. Raises: StoreError."""
        self.place.forget()
        names = [name for name in self.place.all_names() if name.startswith(_DONE)]
        with ThreadPoolExecutor(self.num_writers) as pool:
            list(pool.map(self.place.delete, names))
        self.place.delete(_MARKER)

    def _read_step(self, name: str) -> tuple[str, dict[str, PlaceFile], Any] | None:
        try:
            value = json.loads(self.place.read(name) or b"")
            files = {key: PlaceFile(key, size, tag) for key, (size, tag) in value["files"].items()}
            step = str(value["step"]), files, value["note"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return None if any(self._problem(file) for file in files.values()) else step

    def _problem(self, file: PlaceFile) -> str:
        found = self.place.stat(file.name)
        if found is None:
            return f"{file.name}: missing"
        if (found.size, found.tag) != (file.size, file.tag):
            return f"{file.name}: {found.size} bytes (ETag {found.tag}), written were {file.size} ({file.tag})"
        return ""


@contextlib.contextmanager
def open_upload(url: str | BucketPlace, last: str, *, force: bool = False, advice: str = _FORCE) -> Iterator[Upload]:
    """Locks a folder of a bucket that becomes complete with its file `last`. What is done stays when the body fails.

    With `force` a complete one is replaced; it is no more once `Upload.begin` has been called. `advice` is what to do
    about one that is not replaced.

    Raises: PlaceError when there is something else, or a complete one without `force`; StoreError when another
        process writes it.
    """
    place = url if isinstance(url, BucketPlace) else open_bucket(url)
    if place.file is not None:
        raise PlaceError(f"{place / place.file}: expected the name of a folder")
    place.forget()
    _check(place, last, force, advice)
    lease = take_lease(place, _LOCK)
    try:
        place.forget()
        upload = Upload(place, last, lease)
        if not force and _MARKER in place.all_names() and _is_complete(place, last):
            # It was killed between its last file and this.
            upload.clean()
        _check(place, last, force, advice)
        yield upload
    finally:
        lease.release()


def _check(place: BucketPlace, last: str, force: bool, advice: str) -> None:
    names = set(place.all_names()) - {_LOCK}
    if _MARKER in names:
        return
    if last in names:
        if not force:
            raise PlaceError(f"{place}: exists; {advice}")
    elif names:
        raise PlaceError(f"{place}: is not empty ({listed(sorted(names))}) and has no {last}; choose another folder")


def _is_complete(place: BucketPlace, last: str) -> bool:
    found = place.current(last) if place.stat(last) else None
    return found is not None and found[0] != INCOMPLETE
