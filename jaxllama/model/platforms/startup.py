"""What JAX and libtpu must be told before they look for devices."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

import jax

_LARGE_TILES = "--xla_tpu_impure_use_large_2nd_minor_layout_for_x16"
# What the environment of a TPU VM, a pod or a process that shares a TPU has; libtpu itself sets others.
_TPU_VARIABLES = (
    "CLOUD_TPU_TASK_ID",
    "JAX_FORCE_TPU_INIT",
    "TPU_ACCELERATOR_TYPE",
    "TPU_CHIPS_PER_HOST_BOUNDS",
    "TPU_CHIPS_PER_PROCESS_BOUNDS",
    "TPU_HOST_BOUNDS",
    "TPU_NAME",
    "TPU_PROCESS_ADDRESSES",
    "TPU_PROCESS_BOUNDS",
    "TPU_SKIP_VFIO",
    "TPU_TOPOLOGY",
    "TPU_VISIBLE_CHIPS",
    "TPU_VISIBLE_DEVICES",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
)


def prepare_jax() -> None:
    """Call it before the first use of a device; later calls, and what the user has set already, change nothing.

    Without a TPU, JAX would load an installed libtpu all the same, which prints errors about hosts and may ask a
    metadata server that is not there. Both settings are the process's: `jax_platforms` and `LIBTPU_INIT_ARGS`.
    """
    keep_weights_as_they_are()
    if jax.config.jax_platforms is None and not may_have_tpu() and has_libtpu() and not has_jax_plugins():
        jax.config.update("jax_platforms", "cpu")


def keep_weights_as_they_are() -> None:
    """Has libtpu, unless it is loaded or told otherwise, read bfloat16 weights in the tiles they lie in.

    On a tpu7x it would copy all of them into other tiles at every dispatch: 17 GB a device and 26 ms a step for the
    70B instead of 0.15 GB and 12 ms (bench/LOG.md). v5e, v5p and v6e do the same either way. As an option of a
    program's compilation libtpu does not take it ("No such compile option", libtpu 0.0.50).
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _LARGE_TILES not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {_LARGE_TILES}=false".strip()


def may_have_tpu(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> bool:
    """Whether anything under `root` or in `environ` hints at a TPU: its device files, or what its VMs and pods set."""
    devices = root / "dev"
    has_files = any(devices.glob("accel*")) or any(devices.glob("vfio/*"))
    return has_files or any(environ.get(name) for name in _TPU_VARIABLES)


def has_libtpu() -> bool:
    """Whether JAX would find a libtpu to load."""
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None


def has_jax_plugins() -> bool:
    """Whether other devices' plugins are installed, such as CUDA's: then JAX alone knows which platforms there are."""
    if any(entry_points(group="jax_plugins")):
        return True
    spec = importlib.util.find_spec("jax_plugins")
    return spec is not None and any(pkgutil.iter_modules(spec.submodule_search_locations or []))
