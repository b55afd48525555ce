"""The forms that matrices take on their devices, and the way back.

On CPUs bfloat16 matrices are packed: they lie in the order in which `native.multiply` reads them. 64 outputs lie
together, and of each two inputs beside each other: `[o, i]` is at `[o // 64, i // 2, o % 64, i % 2]`. Packing happens
once, when a model is loaded; XLA's products would do it in every call. On TPUs feed-forward matrices are in parts
(`parts.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, BFloat16

from jaxllama.model import native
from jaxllama.model.params import PackedWeight, Params, ParamSpec
from jaxllama.model.platforms.platform import Platform
from jaxllama.weights.parts import joined, num_ffn_parts, split_ffn

_WIDTH = native.BLOCK_WIDTH


def fit(params: Params, platform: Platform) -> Params:
    """`params` in the form that `platform` wants, each matrix freed before the next is changed.

    Of shapes with shardings, which a plan has instead of arrays, it gives shapes.
    """
    params = split_ffn(params, num_ffn_parts(params, platform.max_part_bytes))
    return pack(params) if platform.packs_weights else params


def pack(params: Params) -> Params:
    """`params`, bfloat16 on one CPU, with the matrices packed.

    A matrix stays as it is if its outputs are not a multiple of 64 or its inputs are odd, and so does an int8 one.
    """
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


def get_whole(params: Params, spec: ParamSpec) -> Any:
    """The array that `spec` describes, as `get_param`; joined, without the other processes, if it is in parts, and
    unpacked."""
    return unpack(joined(params, spec))


def _can_pack(outputs: int, inputs: int) -> bool:
    return outputs % _WIDTH == 0 and inputs % 2 == 0


@partial(jax.jit, donate_argnums=0)
def _pack(weight: BFloat16[Array, "outputs inputs"]) -> BFloat16[Array, "blocks pairs 64 2"]:
    outputs, inputs = weight.shape
    return weight.reshape(outputs // _WIDTH, _WIDTH, inputs // 2, 2).swapaxes(1, 2)
