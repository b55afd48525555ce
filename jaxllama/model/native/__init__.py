"""Kernels of our own for CPUs: products with packed weights, and paged attention.

XLA's library packs the weights of a product in every call, two thirds of a decode step of one request (bench/LOG.md).
Here they are packed once, when a model is loaded. A row's bits depend on no other row, and a token's not on the chunk
it comes in. Where there are no kernels (`library.py`) everything runs through XLA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxllama.errors import ConfigError
from jaxllama.model.cache import KVPool
from jaxllama.model.native.library import begin_loading, is_available
from jaxllama.model.native.packing import PackedWeight, on_parts, pack, packed_rows, row_axes, unpack

__all__ = [
    "PackedWeight",
    "attend",
    "begin_loading",
    "is_available",
    "multiply",
    "pack",
    "packed_rows",
    "run_layer",
    "unpack",
]


def multiply(
    x: Float[Array, "*batch inputs"], *weights: PackedWeight, count: Int32[Array, ""] | None = None
) -> list[Float[Array, "*batch outputs"]]:
    """`x @ weight.T` in float32 of each of the weights; `x` is bfloat16 or float32. A row's bits depend on no other.

    Rows from `count` on are not multiplied; their results are zeros. None: all are. On a mesh every device multiplies
    with what it has: inputs that are split make parts, which are added up; outputs that are split stay so, and all
    weights have their inputs split alike.

    Raises: ConfigError for rows that are not as long as the weights'.
    """
    for weight in weights:
        if weight.num_inputs != x.shape[-1]:  # the kernel would read past the end of either
            raise ConfigError(f"rows of {x.shape[-1]} cannot be multiplied with weights of {weight.num_inputs} inputs")
    mesh, (_, inputs) = weights[0].mesh, weights[0].split_axes
    if mesh is None:
        return _multiply_part(x, weights, count)
    rows = row_axes(x.shape[:-1], mesh)
    batch = [rows, *[None] * (x.ndim - 2)][: x.ndim - 1]

    def run(
        x: Float[Array, "*own own_inputs"], weights: Sequence[PackedWeight], count: Int32[Array, ""] | None
    ) -> list[Float[Array, "*own own_outputs"]]:
        if count is not None and rows is not None:
            count = count - jax.lax.axis_index(rows) * math.prod(x.shape[:-1])
        products = _multiply_part(x, weights, count, len(mesh.local_devices))
        return products if inputs is None else [_sum_in_order(y, inputs) for y in products]

    specs = (PartitionSpec(*batch, inputs), [weight.specs for weight in weights], PartitionSpec())
    outs = [PartitionSpec(*batch, weight.split_axes[0]) for weight in weights]
    return [*on_parts(run, mesh, specs, outs)(x, [*weights], count)]


def _multiply_part(
    x: Float[Array, "*batch inputs"],
    weights: Sequence[PackedWeight],
    count: Int32[Array, ""] | None,
    num_callers: int = 1,
) -> list[Float[Array, "*batch outputs"]]:
    """With what one device has."""
    outs = [jax.ShapeDtypeStruct((*x.shape[:-1], weight.part_shape[0]), jnp.float32) for weight in weights]
    args = (x, *jax.tree.leaves(weights), *([] if count is None else [count]))
    return [*jax.ffi.ffi_call("jaxllama_multiply", outs)(*args, num_callers=np.int64(num_callers))]


def _sum_in_order(part: Float[Array, "*batch outputs"], axes: tuple[str, ...]) -> Float[Array, "*batch outputs"]:
    """The sum over the devices along `axes`, in their order, whatever the size: a reduction of XLA's promises none."""
    parts = jax.lax.all_gather(part, axes)
    return functools.reduce(jnp.add, [parts[i] for i in range(len(parts))])


def attend(
    q: Float[Array, "rows tokens heads head_dim"],
    pool: KVPool,
    page_table: Int32[Array, "rows max_pages"],
    positions: Int32[Array, "rows tokens"],
    window: int | None = None,
    num_callers: int = 1,
) -> Float[Array, "rows tokens heads head_dim"]:
    """As `attention.reference.paged_attention`, for heads of an even size. A query's bits depend on no other.

    Keys before a window are read, and must be finite, where they share a block of 128 with one that is seen.
    `num_callers` devices of this process call at once and share its threads.
    """
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    args = (q, pool.pages, page_table, positions, *([] if pool.scales is None else [pool.scales]))
    result: Array = jax.ffi.ffi_call("jaxllama_attend", out)(
        *args, window=np.int64(window or 0), num_callers=np.int64(num_callers)
    )
    return result


LAYER_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_layer(
    x: Float[Array, "rows tokens embed"],
    weights: Mapping[str, Any],
    pool: KVPool,
    page_table: Int32[Array, "rows max_pages"],
    first_page: Int32[Any, ""],
    positions: Int32[Array, "rows tokens"],
    written: Int32[Array, " rows"],
    angles: tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]],
    *,
    heads: int,
    ffn: int,
    epsilon: float,
    window: int | None = None,
) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
    """A plain Llama's layer with packed `weights`, and the pool with its keys and values.

    Of each row the first `written` tokens are computed and written; the rest of the result is zeros. `page_table` holds
    pages of layer 0, and this layer's begin at `first_page`. What enters a product is rounded to the norms' dtype. A
    token's bits depend on no other row, nor on how many tokens are computed beside it. `window` is as in `attend`.

    Raises: ConfigError for matrices that are not packed, or whose shapes are not those of such a layer.
    """
    _check_layer(weights, pool, hidden=x.shape[-1], heads=heads, ffn=ffn)
    norms = [weights[name] for name in ("input_layernorm", "post_attention_layernorm")]
    cache = jax.tree.leaves(pool)
    args = (x, page_table, first_page, positions, written, *angles)
    out = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, *cache)]
    aliases = {len(args) + i: 1 + i for i in range(len(cache))}
    call = jax.ffi.ffi_call("jaxllama_layer", out, input_output_aliases=aliases)
    attributes = {"heads": np.int64(heads), "ffn": np.int64(ffn), "epsilon": np.float32(epsilon)}
    attributes["window"] = np.int64(window or 0)
    attributes["is_float"] = norms[0].dtype == jnp.float32
    x, *cache = call(*args, *cache, *norms, *jax.tree.leaves([weights[name] for name in LAYER_WEIGHTS]), **attributes)
    return x, jax.tree.unflatten(jax.tree.structure(pool), cache)


def _check_layer(weights: Mapping[str, Any], pool: KVPool, *, hidden: int, heads: int, ffn: int) -> None:
    """Raises: ConfigError for what the kernel would read past its end."""
    head_dim, kv_heads = pool.pages.shape[-1], pool.pages.shape[1 if pool.heads_first else 2] // 2
    q, kv = (heads * head_dim, hidden), (kv_heads * head_dim, hidden)
    shapes = (q, kv, kv, q[::-1], (ffn, hidden), (ffn, hidden), (hidden, ffn))
    for name, shape in zip(LAYER_WEIGHTS, shapes, strict=True):
        weight = weights[name]
        if not isinstance(weight, PackedWeight):
            raise ConfigError(
                f"{name} is not packed, as the kernels of this CPU want it: "
                "jaxllama.load packs what it loads, jaxllama.weights.forms.fit what is there"
            )
        if (weight.num_outputs, weight.num_inputs) != shape:
            raise ConfigError(f"{name} has the shape {(weight.num_outputs, weight.num_inputs)}, expected {shape}")
