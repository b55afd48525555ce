"""A lock in a bucket: an object that its holder renews, and that another takes over once nobody does.

The rule: whoever finds a lock looks at it for a minute. If it changes, it is held. If it does not, or if its holder is
a process of this very machine that has ended, it is replaced by a conditional put, which one of many wins. A holder
that could not renew its own for half a minute (a suspended machine, a lost network) writes nothing more until it has
renewed it. No clock is compared with another's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from jaxllama.errors import StoreError
from jaxllama.weights.places.bucket import BucketPlace, ObjectVersion

RENEWAL_S = 15.0
STALE_S = 60.0
POLL_S = 5.0
# It counts the time that a machine is suspended, too.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)

logger = logging.getLogger("jaxllama")


class Lease:
    """A lock that is held and renewed until it is given back. Take one with `take_lease`."""

    def __init__(
        self, place: BucketPlace, name: str, token: str, version: ObjectVersion, *, was_taken_over: bool, at_s: float
    ) -> None:
        self.was_taken_over = was_taken_over
        self._place = place
        self._name = name
        self._token = token
        self._version = version
        self._count = 0
        self._renewed_s = at_s
        self._is_lost = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="jaxllama-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Must be called before every write. Raises: StoreError when the lock is another's, or cannot be renewed."""
        if self._is_lost or _now_s() - self._renewed_s > STALE_S / 2:
            self.renew()

    def renew(self) -> None:
        """Raises: as `check`."""
        with self._lock:
            started_s = _now_s()
            if not self._is_lost:
                body = _body(self._token, self._count + 1)
                version = self._place.replace(self._name, body, self._version)
                self._is_lost = version is None
            if self._is_lost or version is None:
                raise StoreError(
                    f"{self._place / self._name}: another process has taken the lock over, because this one did not "
                    "renew it in time. It writes there now"
                )
            self._version, self._count, self._renewed_s = version, self._count + 1, started_s

    def release(self) -> None:
        """Removes the lock, if it is still this one's. A store that does not answer keeps it: it becomes stale."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(StoreError):
            self.renew()
            self._place.delete(self._name)

    def _keep(self) -> None:
        while not self._stop.wait(RENEWAL_S):
            with contextlib.suppress(StoreError):
                self.renew()


def take_lease(place: BucketPlace, name: str) -> Lease:
    """Takes the lock `name`; waits up to a minute to see whether one that is there is still held.

    Raises: StoreError when another process holds it.
    """
    token = secrets.token_hex(8)
    for _ in range(3):
        at_s = _now_s()
        if (version := place.create(name, _body(token, 0))) is not None:
            return Lease(place, name, token, version, was_taken_over=False, at_s=at_s)
        found = place.current(name)
        if found is None:
            continue
        holder = _holder(found[0])
        if not _has_ended_here(found[0]):
            logger.warning("%s is locked by %s: looking for %.0f s whether it is renewed", place, holder, STALE_S)
            now = _watch(place, name, found[1])
            if now is None:
                continue
            if now != found[1]:
                raise StoreError(f"{place}: another process is writing it ({holder})")
        at_s = _now_s()
        if (version := place.replace(name, _body(token, 0), found[1])) is not None:
            return Lease(place, name, token, version, was_taken_over=True, at_s=at_s)
    raise StoreError(f"{place}: another process is writing it")


def _watch(place: BucketPlace, name: str, first: ObjectVersion) -> ObjectVersion | None:
    """The lock's version when it changes, or after a minute; None if it goes."""
    until_s = _now_s() + STALE_S
    while True:
        found = place.current(name)
        if found is None or found[1] != first or _now_s() >= until_s:
            return None if found is None else found[1]
        time.sleep(POLL_S)


def _body(token: str, count: int) -> bytes:
    pid = os.getpid()
    value = {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "machine": _machine()}
    return json.dumps({**value, "token": token, "renewals": count}).encode()


def _holder(body: bytes) -> str:
    try:
        value = json.loads(body)
        return f"process {int(value['pid'])} on {str(value['host'])[:80]!r}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "an unknown process"


def _has_ended_here(body: bytes) -> bool:
    """Whether the holder was a process that this one would see, and does not."""
    try:
        value = json.loads(body)
        here, pid = value["machine"] == _machine() != "", int(value["pid"])
        return here and _started(pid) != value["started"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _machine() -> str:
    """This start of this machine, and which of its processes are seen from here; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" if there is none of that number, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _now_s() -> float:
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)
