"""JAX's persistent compilation cache, so that a restart takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs in `folder` (None: `~/.cache/jaxllama/xla`) and reuses them in later processes.

    Changes JAX's global configuration; call it before the first computation.

    Raises: OSError if the folder cannot be made.
    """
    path = Path.home() / ".cache" / "jaxllama" / "xla" if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return path
