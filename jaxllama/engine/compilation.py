"""Compilations: several at a time, counted, and kept on disk so that a restart takes seconds."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

type OnProgress = Callable[[int, int, str], None]
"""Gets how many programs are compiled, of how many, and the names of those at work ("ready" at the end)."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
_MAX_WORKERS = 8


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs in `folder` (None: `~/.cache/jaxllama/xla`) and reuses them in later processes.

    Changes JAX's global configuration; call it before the first computation.

    Raises: OSError if the folder cannot be made.
    """
    path = Path.home() / ".cache" / "jaxllama" / "xla" if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


def compile_all(programs: Mapping[str, Callable[[], Any]], on_progress: OnProgress) -> None:
    """Compiles the programs that `programs` lower (`jit_function.lower(…)`), by name, several at a time.

    A later call of the same jitted function with the same shapes and shardings finds its program in JAX's cache.
    Python traces one at a time; XLA, which takes longer, compiles beside it.

    Raises: whatever a program's tracing or compilation raises; those not begun are dropped then.
    """
    num_workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="jaxllama-compile") as pool:
        left = {pool.submit(lambda lower: lower().compile(), lower): name for name, lower in programs.items()}
        on_progress(0, len(programs), ", ".join([*left.values()][:num_workers]))
        try:
            for done, future in enumerate(as_completed([*left]), start=1):
                future.result()
                del left[future]
                on_progress(done, len(programs), ", ".join([*left.values()][:num_workers]) or "ready")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def num_compilations() -> int:
    """How many programs JAX has compiled, or read from the cache on disk, in this process since the first call."""
    return _compilations().num


class _Compilations:
    def __init__(self) -> None:
        self.num = 0
        self._adding = threading.Lock()

    def listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            with self._adding:
                self.num += 1


@functools.cache
def _compilations() -> _Compilations:
    # JAX's listeners are the process's, so there is one for all engines.
    compilations = _Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations.listen)
    return compilations
