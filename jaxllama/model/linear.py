"""Matrix products and rows of a weight, whatever form it has: plain, int8 or packed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllama.model import native
from jaxllama.model.params import PackedWeight, QuantizedWeight


def product(letters: str, x: Array, weight: Array | QuantizedWeight | PackedWeight, dtype: Any) -> Array:
    """`einsum(letters, x, weight)` in `dtype`."""
    if isinstance(weight, PackedWeight):
        return native.multiply(x, weight.blocks)[0].astype(dtype)
    if isinstance(weight, QuantizedWeight):
        # A TPU's product converts the integers as it reads them. A CPU's does not, and XLA would convert every matrix
        # once, before the loop of decoding, and hold all of them: the barrier ties each to a value of the loop. On a
        # TPU it would cost 6 µs a layer (bench/LOG.md).
        values = jax.lax.platform_dependent(
            weight.values, x, tpu=lambda values, _: values, default=lambda *both: jax.lax.optimization_barrier(both)[0]
        )
        return (product(letters, x, values.astype(x.dtype), dtype) * weight.scale).astype(dtype)
    # A TPU multiplies float32 in one bfloat16 pass unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jnp.einsum(letters, x, weight, precision=precision, preferred_element_type=dtype)


def rows(weight: Array | QuantizedWeight | PackedWeight, ids: Array) -> Array:
    """The rows `ids` of a matrix, in float32."""
    if isinstance(weight, PackedWeight):
        width = native.BLOCK_WIDTH
        return weight.blocks[ids // width, :, ids % width].reshape(*ids.shape, -1).astype(jnp.float32)
    if isinstance(weight, QuantizedWeight):
        return weight.values[ids].astype(jnp.float32) * weight.scale[ids][..., None]
    return weight[ids].astype(jnp.float32)
