"""Symmetric int8, for weights (`QuantizedWeight`) and for the KV cache.

A weight has one scale an output channel, a key or value one a token and head. Both are rows of their last dimension.
"""

from __future__ import annotations

from typing import Any, overload

import jax
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxllama.model.params import Params

_LARGEST = 127
# Below, 127 / largest would overflow float32.
_SMALLEST = 1e-30


@overload
def quantize_rows(x: Float[Array, "*rows width"]) -> tuple[Int8[Array, "*rows width"], Float[Array, "*rows"]]: ...
@overload
def quantize_rows(
    x: Float[np.ndarray, "*rows width"],
) -> tuple[Int8[np.ndarray, "*rows width"], Float[np.ndarray, "*rows"]]: ...
def quantize_rows(
    x: Float[Array | np.ndarray, "*rows width"],
) -> tuple[Int8[Array | np.ndarray, "*rows width"], Float[Array | np.ndarray, "*rows"]]:
    """`(values, scale)` with `x ≈ values * scale` to half a scale; a scale is the row's largest magnitude / 127.

    A row of zeros (or of magnitudes below 1e-30) has values 0. A row with NaN or infinity has scale NaN. NumPy arrays
    give NumPy arrays, of the same bits as XLA's on a CPU; those must be finite.
    """
    xp: Any = x.__array_namespace__()
    x = x.astype(xp.float32)
    largest = xp.max(xp.abs(x), axis=-1, keepdims=True)
    # No division by 127: XLA turns it into this product, NumPy does not.
    scale = xp.where(xp.isfinite(largest), largest * xp.float32(1 / _LARGEST), xp.nan)
    per_step = _LARGEST / xp.where(largest > _SMALLEST, largest, xp.float32(1))
    values = xp.clip(xp.round(x * per_step), -_LARGEST, _LARGEST).astype(xp.int8)
    return values, scale[..., 0].astype(xp.float32)


def quantization(params: Params) -> str | None:
    """As `Case.quantize`: "int8" if the matrices of `params` are kept so, packed or not, else None."""
    values, *_ = jax.tree.leaves(params["embed_tokens"])
    return "int8" if values.dtype == "int8" else None
