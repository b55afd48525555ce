"""Kernels of our own for CPUs: products with packed weights, and paged attention.

XLA's library packs the weights of a product in every call, two thirds of a decode step of one request (bench/LOG.md).
Here they are packed once, when a model is loaded. A row's bits depend on no other row, and a token's not on the chunk
it comes in. Where there are no kernels (`library.py`) everything runs through XLA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxllama.errors import ConfigError
from jaxllama.model.cache import KVPool
from jaxllama.model.native.library import begin_loading, is_available
from jaxllama.model.native.packing import PackedWeight, pack, packed_rows, unpack

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

    Rows from `count` on are not multiplied; their results are zeros. None: all are.

    Raises: ConfigError for rows that are not as long as the weights'.
    """
    for weight in weights:
        if weight.num_inputs != x.shape[-1]:  # the kernel would read past the end of either
            raise ConfigError(f"rows of {x.shape[-1]} cannot be multiplied with weights of {weight.num_inputs} inputs")
    outs = [jax.ShapeDtypeStruct((*x.shape[:-1], weight.num_outputs), jnp.float32) for weight in weights]
    args = (x, *jax.tree.leaves(weights), *([] if count is None else [count]))
    return [*jax.ffi.ffi_call("jaxllama_multiply", outs)(*args)]


def attend(
    q: Float[Array, "rows tokens heads head_dim"],
    pool: KVPool,
    page_table: Int32[Array, "rows max_pages"],
    positions: Int32[Array, "rows tokens"],
    window: int | None = None,
) -> Float[Array, "rows tokens heads head_dim"]:
    """As `attention.reference.paged_attention`, for heads of an even size. A query's bits depend on no other.

    Keys before a window are read, and must be finite, where they share a block of 128 with one that is seen.
    """
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    args = (q, pool.pages, page_table, positions, *([] if pool.scales is None else [pool.scales]))
    result: Array = jax.ffi.ffi_call("jaxllama_attend", out)(*args, window=np.int64(window or 0))
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
