"""A linear layer, whatever form its weight has: plain, int8, or packed for a CPU's kernels.

On a mesh, a chunk's tokens may be split over the devices between products: `SplitTokens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
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
        return self.with_bias(_product(x, self.weight.get_value(), self.dtype, count))

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
        return [layer.with_bias(y.astype(layer.dtype)) for layer, y in zip(layers, products, strict=True)]

    def with_bias(self, y: Float[Array, "*batch outputs"]) -> Float[Array, "*batch outputs"]:
        """`y` and the bias, if there is one."""
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


@dataclass(frozen=True)
class SplitTokens:
    """Chunks of which each device along `axes` of `mesh` has its own tokens between products, and along `rows` its own
    rows.

    What a product's devices add up is then sent to the one that keeps it, and gathered before the next: the bytes of
    a sum on every device, but norms and sums of the residual stream are computed once, not by every device.

    Source: Korthikanti et al. 2022, arXiv:2205.05198 (sequence parallelism).
    """

    mesh: Mesh
    axes: tuple[str, ...]
    rows: tuple[str, ...] = ()

    @property
    def num_parts(self) -> int:
        """How many devices share a row's tokens."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def split(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens embed"]:
        """`x` with each device's own tokens on it."""
        kept: Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._spec(self.axes)))
        return kept

    def whole(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens embed"]:
        """All tokens on every device, of what was split."""

        def gather(x: Float[Array, "rows own embed"]) -> Float[Array, "rows tokens embed"]:
            return jax.lax.all_gather(x, self.axes, axis=1, tiled=True)

        whole: Array = self._run(gather, (self._spec(self.axes),), self._spec())(x)
        return whole

    def summed(
        self, inputs: Sequence[Float[Array, "rows tokens _"]], layers: Sequence[Linear]
    ) -> Float[Array, "rows tokens embed"]:
        """The sum of each of `layers` of its input, split.

        Their last dimension is split as that of the weights. Spelt out: left to XLA, each product's part of a sum is
        sent by itself, or in rings of small messages.
        """
        weights = [layer.weight.get_value() for layer in layers]
        columns = PartitionSpec(None, self.axes)
        specs = [QuantizedWeight(columns, PartitionSpec()) if _is_int8(weight) else columns for weight in weights]

        def add(
            inputs: Sequence[Float[Array, "rows tokens _"]], weights: Sequence[Weight]
        ) -> Float[Array, "rows own embed"]:
            pairs = zip(inputs, weights, layers, strict=True)
            total: Any = sum(_product(x, weight, layer.dtype) for x, weight, layer in pairs)
            # One axis after another: over both, a 4 × 4 slice sends all sums to all.
            for axis in self.axes:
                total = jax.lax.psum_scatter(total, axis, scatter_dimension=1, tiled=True)
            own: Array = total
            return own

        split = [self._spec(None, self.axes)] * len(layers)
        total: Array = self._run(add, (split, specs), self._spec(self.axes))(list(inputs), weights)
        for layer in layers:
            total = layer.with_bias(total)
        return total

    def _spec(self, *axes: tuple[str, ...] | None) -> PartitionSpec:
        return PartitionSpec(self.rows or None, *axes)

    def _run(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _is_int8(weight: Weight) -> bool:
    return isinstance(weight, QuantizedWeight)
