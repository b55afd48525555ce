"""bfloat16 matrices in the order in which `native.multiply` reads them.

64 outputs lie together, and of each two inputs beside each other: `[o, i]` is at `[o // 64, i // 2, o % 64, i % 2]`.
Packing happens once, when a model is loaded; XLA's products would do it in every call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int

from jaxllama.model import native
from jaxllama.model.params import PackedWeight, Params

_WIDTH = native.BLOCK_WIDTH


def pack_weights(params: Params) -> Params:
    """`params` with the matrices packed, each freed before the next, if they are bfloat16 on one CPU that has kernels.

    A matrix stays as it is if its outputs are not a multiple of 64 or its inputs are odd.
    """
    norm = params["norm"]
    if norm.dtype != jnp.bfloat16 or {device.platform for device in norm.sharding.device_set} != {"cpu"}:
        return params
    if len(norm.sharding.device_set) > 1 or not native.is_available():
        return params
    for weights in (params, *params["layers"]):
        for name, weight in weights.items():
            if isinstance(weight, jax.Array) and weight.ndim == 2 and _can_pack(*weight.shape):
                weights[name] = PackedWeight(_pack(weight))
    return params


def unpack(weight: Any) -> Any:
    """The `[out, in]` matrix of a `PackedWeight`; anything else as it is."""
    if not isinstance(weight, PackedWeight):
        return weight
    blocks, pairs, width, pair = weight.blocks.shape
    return weight.blocks.swapaxes(1, 2).reshape(blocks * width, pairs * pair)


def packed_rows(weight: PackedWeight, ids: Int[Array, "*batch"]) -> BFloat16[Array, "*batch inputs"]:
    """The rows `ids` of the matrix."""
    return weight.blocks[ids // _WIDTH, :, ids % _WIDTH].reshape(*ids.shape, -1)


def _can_pack(outputs: int, inputs: int) -> bool:
    return outputs % _WIDTH == 0 and inputs % 2 == 0


@partial(jax.jit, donate_argnums=0)
def _pack(weight: BFloat16[Array, "outputs inputs"]) -> BFloat16[Array, "blocks pairs 64 2"]:
    outputs, inputs = weight.shape
    return weight.reshape(outputs // _WIDTH, _WIDTH, inputs // 2, 2).swapaxes(1, 2)
