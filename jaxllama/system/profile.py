"""Traces of what host and devices do, by JAX's profiler, one at a time."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

MAX_SECONDS = 60.0
"""A trace of a busy server has megabytes a second, and is held in memory until it is written."""


@dataclass(frozen=True)
class Profile:
    """A trace in `folder`, of which `seconds` were recorded and `num_bytes` written."""

    folder: Path
    seconds: float
    num_bytes: int


class Profiler:
    """Records into folders below `folder`, each named by the time (UTC). May be used from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recording = threading.Lock()
        self._stop = threading.Event()

    def record(self, seconds: float) -> Profile | None:
        """Records for so long, or until `stop`, and writes; both take this thread. None while another is recorded.

        The profiler is the process's, and sees the devices of this process alone. Python's own calls are left out: to
        record those would slow down what is measured.

        Raises: OSError if the folder cannot be written.
        """
        import jax

        if not self._recording.acquire(blocking=False):
            return None
        try:
            folder = self._new_folder()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            try:
                jax.profiler.start_trace(folder, profiler_options=options)
            except RuntimeError:  # Whoever has this process's JAX records with it already.
                folder.rmdir()
                return None
            started = time.monotonic()
            try:
                self._stop.wait(min(seconds, MAX_SECONDS))
            finally:
                recorded_s = time.monotonic() - started
                jax.profiler.stop_trace()
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            return Profile(folder, recorded_s, num_bytes)
        finally:
            self._recording.release()

    def stop(self) -> None:
        """Ends what is recorded, and every later trace at once."""
        self._stop.set()

    def _new_folder(self) -> Path:
        name = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        for number in range(1, 1000):
            folder = self._folder / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return folder
        raise OSError(f"{self._folder / name} exists, and 998 others of that second")
