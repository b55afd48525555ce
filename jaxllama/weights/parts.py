"""Feed-forward matrices in parts, so that a TPU can fetch the next one while it multiplies with this one.

XLA prefetches whole arrays into VMEM, 128 MiB on most TPUs: of matrices of 56 MiB it can hold hardly one. In two parts
of 28 MiB, twice as much of the 70B's weights is prefetched on a v6e-8, and a step takes 15.7 ms instead of 16.5
(bench/LOG.md). Slices of one array do not help: they are read, or copied, where they are used.

A layer that is split has `ffn_parts` in the `Params` tree, a list of dicts of feed-forward weights, instead of its own.
Part i has the i-th part of what each device held of the ffn dimension, so nothing moves between devices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from jaxllama.model.params import Params, ParamSpec, QuantizedWeight, get_param

_LANES = 128
_MAX_PARTS = 16
# The dimension of each that is ffn.
_FFN_AXIS = {"gate_proj": 0, "up_proj": 0, "gate_proj_bias": 0, "up_proj_bias": 0, "down_proj": 1}


def num_ffn_parts(params: Params, max_part_bytes: int | None) -> int:
    """How many parts suit the devices that hold `params` (arrays, or shapes with shardings); see `Platform`."""
    if max_part_bytes is None:
        return 1
    gate = params["layers"][0]["gate_proj"]
    gate = gate.values if isinstance(gate, QuantizedWeight) else gate
    width, embed = gate.sharding.shard_shape(gate.shape)
    return suitable_num_parts(width, width * embed * gate.dtype.itemsize, max_part_bytes)


def suitable_num_parts(width: int, num_bytes: int, max_part_bytes: int) -> int:
    """For a device's share of gate_proj, `width` of ffn and `num_bytes` in all: few parts, of whole lanes each."""
    possible = [n for n in range(1, _MAX_PARTS + 1) if width % (n * _LANES) == 0]
    enough = [n for n in possible if num_bytes <= n * max_part_bytes]
    return min(enough, default=max(possible, default=1))


def split_ffn(params: Params, num_parts: int) -> Params:
    """`params` with every layer's feed-forward weights in parts; a layer's own are freed before the next is split."""
    if num_parts > 1:
        for layer in params["layers"]:
            names = [name for name in (*_FFN_AXIS, "down_proj_bias") if name in layer]
            weights = {name: layer.pop(name) for name in names}
            parts: list[dict[str, Any]] = [{} for _ in range(num_parts)]
            for name, weight in weights.items():
                if name == "down_proj_bias":
                    parts[0][name] = weight
                    continue
                for part, piece in zip(parts, _split_weight(weight, _FFN_AXIS[name], num_parts), strict=True):
                    part[name] = piece
            layer["ffn_parts"] = parts
    return params


def joined(params: Params, spec: ParamSpec) -> Any:
    """What `spec` describes, as `get_param`; joined, without the other processes, if it is in parts."""
    layer = params["layers"][spec.path[1]] if spec.path[0] == "layers" else {}
    name = str(spec.path[2]) if layer else ""
    if name in layer or "ffn_parts" not in layer:
        return get_param(params, spec)
    in_part = replace(spec, path=spec.path[2:])
    pieces = [get_param(part, in_part) for part in layer["ffn_parts"] if name in part]
    axis = _FFN_AXIS.get(name, 0)
    # The bias and the scales of down_proj have no such dimension.
    return _join(pieces, axis) if spec.axes[axis:] and spec.axes[axis] == "ffn" else pieces[0]


def _split_weight(weight: Any, axis: int, num_parts: int) -> list[Any]:
    if isinstance(weight, QuantizedWeight):
        values = _split(weight.values, axis, num_parts)
        scales = _split(weight.scale, 0, num_parts) if axis == 0 else [weight.scale] * num_parts
        return [QuantizedWeight(*pair) for pair in zip(values, scales, strict=True)]
    return _split(weight, axis, num_parts)


def _split(array: Any, axis: int, num_parts: int) -> list[Any]:
    """What each device holds, split along `axis`; of a shape, shapes."""
    shape = tuple(n // num_parts if i == axis else n for i, n in enumerate(array.shape))
    if isinstance(array, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding)] * num_parts
    shards = [jnp.split(shard.data, num_parts, axis) for shard in array.addressable_shards]
    return [_assemble(shape, array.sharding, list(pieces)) for pieces in zip(*shards, strict=True)]


def _join(pieces: list[Shaped[jax.Array, " ..."]], axis: int) -> Shaped[jax.Array, " ..."]:
    shape = tuple(n * len(pieces) if i == axis else n for i, n in enumerate(pieces[0].shape))
    by_device = zip(*([shard.data for shard in piece.addressable_shards] for piece in pieces), strict=True)
    return _assemble(shape, pieces[0].sharding, [jnp.concatenate(data, axis) for data in by_device])


def _assemble(
    shape: tuple[int, ...], sharding: Any, shards: list[Shaped[jax.Array, " ..."]]
) -> Shaped[jax.Array, " ..."]:
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
