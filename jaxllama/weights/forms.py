"""The forms that matrices take on their devices, and the way back.

On CPUs matrices are packed (`native.packing`), once, when a model is loaded; XLA's products would do it in every call.
On TPUs feed-forward matrices are in parts (`parts.py`).
"""

from __future__ import annotations

from typing import Any

import jax

from jaxllama.model import native
from jaxllama.model.params import Params, ParamSpec, QuantizedWeight
from jaxllama.model.platforms.platform import Platform
from jaxllama.weights.parts import joined, num_ffn_parts, split_ffn


def fit(params: Params, platform: Platform) -> Params:
    """`params` in the form that `platform` wants, each matrix freed before the next is changed.

    Of shapes with shardings, which a plan has instead of arrays, it gives shapes.
    """
    params = split_ffn(params, num_ffn_parts(params, platform.max_part_bytes))
    return pack(params) if platform.packs_weights else params


def pack(params: Params) -> Params:
    """`params`, on CPUs, with the matrices packed."""
    for weights in (params, *params["layers"]):
        for name, weight in weights.items():
            values = weight.values if isinstance(weight, QuantizedWeight) else weight
            if isinstance(values, jax.Array) and values.ndim == 2:
                weights[name] = native.pack(weight)
    return params


def unpack(weight: Any) -> Any:
    """What was packed; anything else as it is."""
    return native.unpack(weight) if isinstance(weight, native.PackedWeight) else weight


def get_whole(params: Params, spec: ParamSpec) -> Any:
    """The array that `spec` describes, as `get_param`; unpacked, and joined, without the other processes, where it is
    in parts."""
    return unpack(joined(params, spec))
