"""From a checkpoint to weights on a mesh, rounded to int8 on the way if asked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllama.errors import CheckpointError, ConfigError
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import param_shardings
from jaxllama.model.params import (
    QUANTIZATIONS,
    Params,
    ParamSpec,
    QuantizedWeight,
    build_params,
    get_param,
    param_specs,
)
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.weights.checkpoint import Checkpoint, restore_params
from jaxllama.weights.forms import fit


def load_params(checkpoint: Checkpoint, mesh: Mesh, dtype: Any, quantize: str | None = None) -> Params:
    """The weights, sharded by the rules, in `dtype` and in the form that suits the devices.

    Matrices are int8 if they are stored so or `quantize` is "int8".
    Rounded is what is stored, whatever `dtype`: a layer is read, rounded on its devices and freed before the next.

    Raises: CheckpointError as `restore_params`, or when a matrix to be rounded has NaN or infinity; ConfigError.
    """
    config, stored = checkpoint.config, checkpoint.manifest.quantize
    if quantize not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantize must be 'int8' or None, got {quantize!r}")
    platform = describe_platform(config, mesh, dtype=dtype)
    if quantize in (None, stored):
        return fit(restore_params(checkpoint, dtype, param_shardings(config, mesh, stored)), platform)
    leaves: dict[tuple[str | int, ...], Any] = {}
    for layer in _layers(param_specs(config)):
        leaves |= _quantized_layer(checkpoint, mesh, dtype, quantize, layer)
    return fit(build_params(config, lambda part: leaves.pop(part.path), quantize), platform)


def _quantized_layer(
    checkpoint: Checkpoint, mesh: Mesh, dtype: Any, quantize: str | None, layer: list[ParamSpec]
) -> dict[tuple[str | int, ...], Any]:
    """The arrays of some tensors by their paths. What was read is freed on return."""
    config, leaves = checkpoint.config, {}
    read = restore_params(checkpoint, None, param_shardings(config, mesh), only=layer)
    shardings = param_shardings(config, mesh, quantize)
    for spec in layer:
        weight, sharding = get_param(read, spec), get_param(shardings, spec)
        if not isinstance(sharding, QuantizedWeight):
            leaves[spec.path] = weight.astype(dtype)
            continue
        values, scale = jax.jit(quantize_rows, out_shardings=tuple(sharding))(weight)
        if not jnp.isfinite(scale).all():
            raise CheckpointError(f"{checkpoint.path}: {spec.name} has NaN or infinite values")
        leaves |= {(*spec.path, "values"): values, (*spec.path, "scale"): scale}
    return leaves


def _layers(specs: tuple[ParamSpec, ...]) -> list[list[ParamSpec]]:
    """The tensors of each layer together, the others alone."""
    groups: dict[tuple[str | int, ...], list[ParamSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.path[:2], []).append(spec)
    return list(groups.values())
