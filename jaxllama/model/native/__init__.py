"""Kernels of our own for CPUs: products with packed weights, and paged attention.

XLA's library packs the weights of a product in every call, two thirds of a decode step of one request (bench/LOG.md).
Here they are packed once, when a model is loaded. A row's bits depend on no other row, and a token's not on the chunk
it comes in. Where there are no kernels (`library.py`) everything runs through XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxllama.model.cache import KVPool
from jaxllama.model.native.library import is_available
from jaxllama.model.native.packing import PackedWeight, pack, packed_rows, unpack

__all__ = ["PackedWeight", "attend", "is_available", "multiply", "pack", "packed_rows", "unpack"]


def multiply(x: Float[Array, "*batch inputs"], *weights: PackedWeight) -> list[Float[Array, "*batch outputs"]]:
    """`x @ weight.T` in float32 of each of the weights; `x` is bfloat16 or float32. A row's bits depend on no other."""
    outs = [jax.ShapeDtypeStruct((*x.shape[:-1], weight.num_outputs), jnp.float32) for weight in weights]
    return [*jax.ffi.ffi_call("jaxllama_multiply", outs)(x, *jax.tree.leaves(weights))]


def attend(
    q: Float[Array, "rows tokens heads head_dim"],
    pool: KVPool,
    page_table: Int32[Array, "rows max_pages"],
    positions: Int32[Array, "rows tokens"],
) -> Float[Array, "rows tokens heads head_dim"]:
    """As `attention.reference.paged_attention`, for heads of an even size. A query's bits depend on no other."""
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    args = (q, pool.pages, page_table, positions, *([] if pool.scales is None else [pool.scales]))
    result: Array = jax.ffi.ffi_call("jaxllama_attend", out)(*args)
    return result
