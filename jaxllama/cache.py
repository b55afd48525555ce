"""The paged KV cache: one flat pool of pages for all layers.

Layer l's pages are `l * num_pages … (l + 1) * num_pages - 1`; a row's page table holds page numbers of layer 0. Keys
and values are interleaved by head (K0 V0 K1 V1 …), as TPU attention kernels read them. Page 0 is never given to a row:
a table's unused entries are 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllama.config import LlamaConfig

type KVPool = Float[Array, "pages page_size kv2 head_dim"]

KV_POOL_AXES = ("pages", "page", "kv_heads", "head_dim")


def kv_pool_shape(config: LlamaConfig, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
    """`[num_layers * num_pages, page_size, 2 * num_kv_heads, head_dim]`."""
    return (config.num_layers * num_pages, page_size, 2 * config.num_kv_heads, config.head_dim)


def kv_bytes_per_token(config: LlamaConfig, dtype: jnp.dtype) -> int:
    """Bytes that one token takes in all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def interleave_kv(
    k: Float[Array, "*batch kv head_dim"], v: Float[Array, "*batch kv head_dim"]
) -> Float[Array, "*batch kv2 head_dim"]:
    """K0 V0 K1 V1 …"""
    return jnp.stack((k, v), axis=-2).reshape(*k.shape[:-2], 2 * k.shape[-2], k.shape[-1])


def write_tokens(
    pool: KVPool,
    kv: Float[Array, "rows kv2 head_dim"],
    page_table: Int[Array, "rows max_pages"],
    positions: Int[Array, " rows"],
    valid: Bool[Array, " rows"],
) -> KVPool:
    """Writes one token a row at its position. Rows that are not `valid` write nothing.

    `page_table` holds pages of the layer that is written (already offset).
    """
    num_pages, page_size = pool.shape[:2]
    pages = jnp.take_along_axis(page_table, positions[:, None] // page_size, axis=1)[:, 0]
    slots = jnp.where(valid, pages * page_size + positions % page_size, num_pages * page_size)
    flat = pool.reshape(num_pages * page_size, *pool.shape[2:])
    return flat.at[slots].set(kv.astype(pool.dtype), mode="drop").reshape(pool.shape)


def write_pages(
    pool: KVPool,
    kv: Float[Array, "tokens kv2 head_dim"],
    page_table: Int[Array, " max_pages"],
    start: Int[Array, ""],
    num_tokens: Int[Array, ""],
) -> KVPool:
    """Writes a chunk of one row from position `start`, whole pages at a time.

    `start` and the chunk's length are multiples of the page size. Of the chunk, `num_tokens` are real: pages past them
    are not written, and what the last page holds past them is never read before it is overwritten.
    """
    num_pages, page_size = pool.shape[:2]
    chunk_pages = kv.shape[0] // page_size
    pages = jax.lax.dynamic_slice_in_dim(page_table, start // page_size, chunk_pages)
    pages = jnp.where(jnp.arange(chunk_pages) * page_size < num_tokens, pages, num_pages)
    blocks = kv.astype(pool.dtype).reshape(chunk_pages, page_size, *kv.shape[1:])
    return pool.at[pages].set(blocks, mode="drop")


def clear_pages(pool: KVPool, pages: Int[Array, " max_pages"], count: Int[Array, ""], num_layers: int) -> KVPool:
    """Zeros in the first `count` of `pages` (numbers of layer 0), in every layer."""
    layers = pool.reshape(num_layers, -1, *pool.shape[1:])
    zeros = jnp.zeros((num_layers, 1, *pool.shape[1:]), pool.dtype)

    def clear(index: Array, layers: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(layers, zeros, pages[index], axis=1)

    return jax.lax.fori_loop(0, count, clear, layers).reshape(pool.shape)
