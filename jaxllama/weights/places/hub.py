"""A model on the Hugging Face hub, by `org/name[@revision][:file.gguf]`, or what the hub's cache has of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxllama.errors import MissingExtraError, PlaceError, StoreError
from jaxllama.weights.places.http_ranges import HttpRanges, RefusedError
from jaxllama.weights.places.local import LocalPlace
from jaxllama.weights.places.place import Place, PlaceFile
from jaxllama.weights.places.retries import ReadInterruptedError, attempt, fill

_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w.-]+\.gguf))?", re.ASCII
)
_TIMEOUT_S = 30.0
_WORTH_ANOTHER_TRY = frozenset({408, 429, 500, 502, 503, 504})


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id."""
    return _ID.fullmatch(text) is not None


def open_hub(text: str) -> Place:
    """The model's files at the commit that the revision (default: main) is now.

    Offline (HF_HUB_OFFLINE=1), or where the hub cannot be reached, the files that its cache has.

    Raises: PlaceError saying what to do for a model that does not exist, is private or gated; StoreError.
    """
    parts = _ID.fullmatch(text)
    assert parts is not None, text
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingExtraError("hub", error.name or "huggingface_hub") from None
    from huggingface_hub import constants

    repo, revision, file = parts["id"], parts["revision"], parts["file"]
    if constants.HF_HUB_OFFLINE:
        cached = _cached_folder(repo, revision, file)
        if cached is None:
            raise PlaceError(
                f"{text}: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not have it. Unset it, or download "
                f"the model on a machine with a network: hf download {repo}"
            )
        return cached
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
    try:
        info = attempt(text, lambda: _ask(text, lambda: api.model_info(repo, revision=revision, files_metadata=True)))
    except StoreError as error:
        cached = _cached_folder(repo, revision, file)
        if cached is None:
            raise StoreError(f"{error}. The cache, {constants.HF_HUB_CACHE}, does not have the model either") from None
        return cached
    files = {
        item.rfilename: PlaceFile(
            item.rfilename,
            item.size,
            item.lfs.sha256 if item.lfs else item.blob_id or "",
            item.lfs.sha256 if item.lfs else None,
        )
        for item in info.siblings or ()
        if item.size is not None
    }
    if file is not None and file not in files:
        ggufs = [name for name in sorted(files) if name.endswith(".gguf")]
        raise PlaceError(f"{text}: the model has no file {file}; its GGUF files: {', '.join(ggufs) or 'none'}")
    return HubPlace(repo, info.sha or revision or "main", files, file)


class HubPlace(Place):
    """A commit of a model repository. What the hub's cache has is read from there."""

    num_readers = 16

    def __init__(self, repo: str, commit: str, files: dict[str, PlaceFile], file: str | None) -> None:
        self.repo = repo
        self.commit = commit
        self.file = file
        self.name = repo
        self.where = f"{repo}@{commit[:12]}"
        self._files = files
        self._ranges = HttpRanges()
        self._cached: dict[str, LocalPlace | None] = {}
        self._locations: dict[str, tuple[str, dict[str, str]]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return sorted(name for name in self._files if "/" not in name)

    def all_names(self) -> list[str]:
        return sorted(self._files)

    def stat(self, name: str) -> PlaceFile | None:
        return self._files.get(name)

    def read_into(self, file: PlaceFile, offset: int, buffer: memoryview) -> None:
        cached = self._cached_file(file)
        if cached is not None:
            local = cached.stat(file.name)
            assert local is not None
            cached.read_into(local, offset, buffer)
            return
        where = self / file.name
        if offset + len(buffer) > file.size:
            raise StoreError(f"{where}: ends at byte {file.size}, asked were {len(buffer)} bytes from {offset}")
        if buffer:
            fill(where, buffer, lambda done, rest: self._read(file, offset + done, rest))

    def close(self) -> None:
        self._ranges.close()
        for cached in self._cached.values():
            if cached is not None:
                cached.close()

    def _read(self, file: PlaceFile, offset: int, rest: memoryview) -> None:
        where = self / file.name
        url, headers = self._location(file)
        try:
            self._ranges.read(where, url, headers, offset, rest, file.size)
        except RefusedError as error:
            # Signed addresses expire; the hub gives a new one, or says what is wrong.
            with self._lock:
                self._locations.pop(file.name, None)
            raise ReadInterruptedError(f"the store answered {error.status}") from None

    def _location(self, file: PlaceFile) -> tuple[str, dict[str, str]]:
        """Where the hub sends readers of the file, and the headers for it."""
        with self._lock:
            known = self._locations.get(file.name)
        if known is not None:
            return known
        from huggingface_hub import constants, get_hf_file_metadata, get_token
        from huggingface_hub.utils import build_hf_headers

        where, token = self / file.name, get_token()
        url = f"{constants.ENDPOINT}/{self.repo}/resolve/{quote(self.commit, safe='')}/{quote(file.name)}"
        found = _ask(where, lambda: get_hf_file_metadata(url, token=token, timeout=_TIMEOUT_S))
        if found.size is not None and found.size != file.size:
            raise StoreError(f"{where}: has {found.size} bytes now, expected {file.size}")
        if file.tag and found.etag and found.etag != file.tag:
            raise StoreError(f"{where}: has changed (ETag {found.etag}, expected {file.tag})")
        same_host = found.location.split("/")[:3] == url.split("/")[:3]
        headers = build_hf_headers(token=token) if same_host else {}
        with self._lock:
            self._locations[file.name] = found.location, headers
        return found.location, headers

    def _cached_file(self, file: PlaceFile) -> LocalPlace | None:
        with self._lock:
            if file.name not in self._cached:
                self._cached[file.name] = _cached_folder(self.repo, self.commit, file.name)
            return self._cached[file.name]


def _cached_folder(repo: str, revision: str | None, file: str | None) -> LocalPlace | None:
    """The cache's folder of a model, if it has `file` (None: config.json, or an adapter's)."""
    from huggingface_hub import try_to_load_from_cache

    names = (file,) if file else ("config.json", "adapter_config.json")
    found = (try_to_load_from_cache(repo, name, revision=revision) for name in names)
    path = next((path for path in found if isinstance(path, str)), None)
    if path is None:
        return None
    place = LocalPlace(Path(path).parent)
    place.file, place.name = file, repo
    return place


def _ask[T](where: str, ask: Callable[[], T]) -> T:
    """The hub's answer. Raises: PlaceError saying what to do; ReadInterruptedError for what may go better next time."""
    from huggingface_hub import constants, errors, get_token

    hub = constants.ENDPOINT
    has_token = get_token() is not None
    repo = where.split("@")[0].split(":")[0]
    log_in = "set HF_TOKEN, or run: hf auth login"
    try:
        return ask()
    except errors.GatedRepoError:
        how = "with the account of your token" if has_token else f"and {log_in}"
        raise PlaceError(f"{where}: is gated. Accept its terms at {hub}/{repo} {how}") from None
    except errors.RevisionNotFoundError:
        raise PlaceError(f"{where}: the hub ({hub}) has the model, but not this revision") from None
    except errors.EntryNotFoundError:
        raise PlaceError(f"{where}: the hub ({hub}) no longer has this file") from None
    except errors.RepositoryNotFoundError:
        how = "that your token may read" if has_token else f"that is public; for a private one {log_in}"
        raise PlaceError(f"{where}: the hub ({hub}) has no such model {how}. Is the name right?") from None
    except errors.HfHubHTTPError as error:
        status = _status(error)
        if status in _WORTH_ANOTHER_TRY:
            raise ReadInterruptedError(f"the hub ({hub}) answered {status}") from None
        if status in (401, 403):
            how = "your token may not read it" if has_token else log_in
            raise PlaceError(f"{where}: the hub ({hub}) refuses ({status}): {how}") from None
        raise StoreError(f"{where}: the hub ({hub}) answered {status}") from None
    except errors.HFValidationError as error:
        raise PlaceError(f"{where}: not the name of a model ({' '.join(str(error).split())[:200]})") from None
    except (PlaceError, StoreError):
        raise
    # What the client raises for connections differs between its versions.
    except Exception as error:
        raise ReadInterruptedError(f"the hub ({hub}) cannot be reached: {type(error).__name__}") from None


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))
