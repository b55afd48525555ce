"""A Hugging Face hub on loopback, as far as models are read from it, that does what it is told to do wrong.

GET  /api/models/ORG/NAME[/revision/REV]     the commit and its files, with sizes and hashes
HEAD /ORG/NAME/resolve/REV/FILE              small files are there; large ones at a signed address of another host
GET  /cdn/SHA256?Signature=…                 ranges, for whoever does not send a token there
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loopback

TOKEN = "hf_standin_token"


@dataclass
class Repo:
    """A model's files at its one commit."""

    files: dict[str, bytes]
    is_private: bool = False
    is_gated: bool = False
    commit: str = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub(loopback.StandIn):
    """`faults` are what the next answers to requests of large files do wrong, one each. `ranges` is what was read."""

    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    api_faults: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path, **how: Any) -> Repo:
        """A model with the files of `folder`."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.repos[name] = Repo(files, **how)
        return self.repos[name]

    def next_fault(self, faults: list[str]) -> str:
        with self.lock:
            return faults.pop(0) if faults else ""

    @property
    def num_read(self) -> int:
        """The bytes of large files that were sent."""
        return sum(stop - start for _, start, stop in self.ranges)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


class _Handler(loopback.Handler):
    def do_GET(self) -> None:
        hub: Hub = self.server.standin
        path = self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/cdn/"):
            self._send_range(hub, path.removeprefix("/cdn/"))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            fault = hub.next_fault(hub.api_faults)
            if fault:
                self._answer(int(fault), headers={"Retry-After": "0"})
            elif repo := self._repo(hub, match[1], match[2]):
                self._answer(200, json.dumps(self._info(match[1], repo)).encode())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if repo := self._repo(hub, match[1], match[2]):
                self._resolve(hub, repo, match[3])
        else:
            self._answer(404)

    def _repo(self, hub: Hub, name: str, revision: str | None) -> Repo | None:
        repo, has_token = hub.repos.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.is_private and not has_token):
            self._answer(404 if has_token else 401, headers={"X-Error-Code": "RepoNotFound"})
        elif repo.is_gated:
            self._answer(403 if has_token else 401, headers={"X-Error-Code": "GatedRepo"})
        elif revision not in (None, "main", "v1", repo.commit):
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _info(self, name: str, repo: Repo) -> dict[str, Any]:
        siblings = []
        for file, data in repo.files.items():
            digest = hashlib.sha256(data).hexdigest()
            item: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if is_large(file):
                item["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(item)
        return {"id": name, "sha": repo.commit, "siblings": siblings, "private": repo.is_private, "tags": []}

    def _resolve(self, hub: Hub, repo: Repo, file: str) -> None:
        data = repo.files.get(file)
        if data is None:
            return self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": repo.commit}
        if not is_large(file):
            etag = hashlib.sha1(data).hexdigest()
            return self._answer(*self._cut(data), headers={**headers, "ETag": f'"{etag}"'})
        digest = hashlib.sha256(data).hexdigest()
        port = self.server.server_address[1]
        headers |= {
            # Another host than the hub's, as the real one.
            "Location": f"http://localhost:{port}/cdn/{digest}?Signature=secret",
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(data)),
        }
        return self._answer(302, headers=headers)

    def _cut(self, data: bytes) -> tuple[int, bytes]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            return 200, data
        self._range = f"bytes {match[1]}-{match[2]}/{len(data)}"
        return 206, data[int(match[1]) : int(match[2]) + 1]

    def _send_range(self, hub: Hub, digest: str) -> None:
        if "Authorization" in self.headers:
            hub.leaked.append(self.path)
        files = {
            hashlib.sha256(data).hexdigest(): (name, data) for r in hub.repos.values() for name, data in r.files.items()
        }
        fault = hub.next_fault(hub.faults)
        if fault.isdigit():
            return self._answer(int(fault), b"wait", headers={"Retry-After": "0"})
        name, data = files[digest]
        status, body = self._cut(data)
        headers = {"ETag": f'"{digest}"' if fault != "etag" else '"another"'}
        start = int(self._range.split()[1].split("-")[0])
        if fault == "no ranges":
            return self._answer(200, data, headers=headers)
        if fault == "slow":
            time.sleep(0.3)
        if fault == "repeated":
            self._range = f"bytes 0-{len(body) - 1}/{len(data)}"
            body = data[: len(body)]
        if fault == "shrunk":
            self._range = self._range.replace(f"/{len(data)}", f"/{len(data) - 1}")
        sent = body[: len(body) // 2] if fault in ("dropped", "short") else body
        if not fault or fault in ("slow", "dropped", "short"):
            with hub.lock:
                hub.ranges.append((name, start, start + len(sent)))
        self._answer(status, sent, headers=headers, length=len(sent) if fault == "short" else len(body))
        if fault == "dropped":
            self.wfile.flush()
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return None

    _range = ""

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        ranged = {"Content-Range": self._range} if status == 206 else {}
        super()._answer(status, body, {**(headers or {}), **ranged}, length)


def running() -> AbstractContextManager[Hub]:
    """A hub on a free port, for as long as the body runs."""
    return loopback.running(Hub(), _Handler)
