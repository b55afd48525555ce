"""A linear layer, whatever form its weight has: plain, int8, or packed for a CPU's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllama.model import native
from jaxllama.model.native import PackedWeight
from jaxllama.model.params import QuantizedWeight

type Weight = Array | QuantizedWeight | PackedWeight


class Linear(nnx.Module):
    """`x @ weight.T + bias` in `dtype`, with a weight that is `[out, in]` in its plain form.

    `weights` holds it by `name`, and a bias by `name_bias` if there is one.
    """

    def __init__(self, weights: Mapping[str, Any], name: str, dtype: Any) -> None:
        self.dtype = dtype
        self.weight = nnx.Param(weights[name])
        self.bias = nnx.Param(weights[f"{name}_bias"]) if f"{name}_bias" in weights else None

    def __call__(
        self, x: Float[Array, "*batch inputs"], count: Int[Array, ""] | None = None
    ) -> Float[Array, "*batch outputs"]:
        """Rows from `count` on may be left out where that saves time."""
        return self._with_bias(_product(x, self.weight.get_value(), self.dtype, count))

    def rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch inputs"]:
        """The rows `ids` of the weight in float32, as an embedding takes them."""
        weight: Weight = self.weight.get_value()
        if isinstance(weight, PackedWeight):
            return native.packed_rows(weight, ids)
        if isinstance(weight, QuantizedWeight):
            return weight.values[ids].astype(jnp.float32) * weight.scale[ids][..., None]
        return weight[ids].astype(jnp.float32)

    @staticmethod
    def together(x: Float[Array, "*batch inputs"], *layers: Linear) -> list[Float[Array, "*batch _"]]:
        """Each of `layers` of the same `x`. Packed weights take one call, so that a CPU's threads wait once."""
        weights = [layer.weight.get_value() for layer in layers]
        if not all(isinstance(weight, PackedWeight) for weight in weights):
            return [layer(x) for layer in layers]
        products = native.multiply(x, *weights)
        return [layer._with_bias(y.astype(layer.dtype)) for layer, y in zip(layers, products, strict=True)]

    def _with_bias(self, y: Float[Array, "*batch outputs"]) -> Float[Array, "*batch outputs"]:
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _product(
    x: Float[Array, "*batch inputs"], weight: Weight, dtype: Any, count: Int[Array, ""] | None = None
) -> Float[Array, "*batch outputs"]:
    if isinstance(weight, PackedWeight):
        return native.multiply(x, weight, count=count)[0].astype(dtype)
    if isinstance(weight, QuantizedWeight):
        # A TPU's product converts the integers as it reads them. A CPU's does not, and XLA would convert every matrix
        # once, before the loop of decoding, and hold all of them: the barrier ties each to a value of the loop. On a
        # TPU it would cost 6 µs a layer (bench/LOG.md).
        values = jax.lax.platform_dependent(
            weight.values, x, tpu=lambda values, _: values, default=lambda *both: jax.lax.optimization_barrier(both)[0]
        )
        return (_product(x, values.astype(x.dtype), dtype) * weight.scale).astype(dtype)
    precision = precision_of(weight.dtype)
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision, preferred_element_type=dtype)


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Of a product of `dtype`: unless told otherwise a TPU multiplies float32 in one bfloat16 pass, a GPU as TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
