"""Compilations: several at a time, counted, and kept on disk so that a restart takes seconds."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

from jaxllama.system.progress import is_watched

type OnProgress = Callable[[int, int, str], None]
"""Gets how many programs are compiled, of how many, and the names of those at work ("ready" at the end)."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
_MAX_WORKERS = 8


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs in `folder` (None: `~/.cache/jaxllama/xla`) and reuses them in later processes.

    Changes JAX's configuration, which is the whole process's.

    Raises: OSError if the folder cannot be made.
    """
    path = Path.home() / ".cache" / "jaxllama" / "xla" if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if jax.config.jax_compilation_cache_dir not in (None, str(path)):
        compilation_cache.reset_cache()  # JAX holds on to the folder that it has used first.
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


def use_compilation_cache(setting: str | os.PathLike[str] | None) -> None:
    """Does what `EngineOptions.compilation_cache` says: keeps programs in that folder, or with "off" leaves JAX alone.

    None is the default folder, unless JAX was told of another one or to keep nothing. Where that folder cannot be made
    the engine runs without: a start takes longer, and that is all.

    Raises: OSError if a folder that was asked for cannot be made.
    """
    if setting == "off":
        return
    if setting is not None:
        enable_compilation_cache(setting)
    elif jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: nobody's home is known.
            enable_compilation_cache()


@contextlib.contextmanager
def announced(what: str, *, after_s: float = 2.0) -> Iterator[None]:
    """Says on stderr that `what` is being compiled once the body has taken `after_s`, and at its end how long it took.

    To people only: on a terminal and in a notebook.
    """
    started, done = time.monotonic(), threading.Event()

    def say() -> None:
        if done.wait(after_s) or not is_watched():
            return
        print(f"jaxllama: compiling {what} …", file=sys.stderr, flush=True)
        done.wait()
        print(f"jaxllama: compiled {what} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    speaker = threading.Thread(target=say, name="jaxllama-compiling", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


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
