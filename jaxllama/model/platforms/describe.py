"""Which description fits a model on a mesh: one file for each kind of device has it.

A new kind is a file with a `describe`, an entry in `_KINDS` and, if plain JAX is not enough, a kernel in `attention/`.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllama.model.config import LlamaConfig
from jaxllama.model.platforms.platform import Case, Platform

# JAX's names of platforms. Devices that are only described, for compilation ahead of time, have "cuda" or "rocm".
_KINDS = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def describe_platform(
    config: LlamaConfig, mesh: Mesh, *, dtype: Any, kv_dtype: Any = None, quantize: str | None = None
) -> Platform:
    """How `config`'s model runs on `mesh`, with products of `dtype` and a cache of `kv_dtype` (None: as `dtype`).

    `quantize` is how matrices are kept (`params.quantization`). What concerns the weights depends neither on it nor on
    `kv_dtype`. Devices of a kind that is not known run plain JAX.
    """
    dtype = jnp.dtype(dtype)
    kv_dtype = dtype if kv_dtype is None else jnp.dtype(kv_dtype)
    case = Case(config, mesh, dtype.name, kv_dtype.name, quantize)
    name = mesh.devices.flat[0].platform
    if name not in _KINDS:
        return Platform(name, case.reference())
    # Not all of them: Pallas alone, which a TPU's kernels are written in, takes half a second.
    kind = importlib.import_module(f"jaxllama.model.platforms.{_KINDS[name]}")
    described: Platform = kind.describe(case)
    return described
