"""The paged KV cache: one flat pool of pages for all layers, on each shard of a mesh its own.

Layer l's pages are `l * num_pages … (l + 1) * num_pages - 1`; a row's page table holds page numbers of layer 0. Keys
and values are interleaved by head (K0 V0 K1 V1 …), as TPU attention kernels read them. Page 0 is never given to a row:
a table's unused entries are 0.

Pages of floats hold tokens of heads, pages of int8 heads of tokens: a TPU pads the last but one dimension of int8 to a
multiple of 32, which one head a device is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from jaxllama.model.config import LlamaConfig
from jaxllama.model.int8 import quantize_rows


class KVPool(NamedTuple):
    """Keys and values of every layer: floats, or int8 with one scale a token and head.

    `scales` is float32, and None for floats: another tree, so another program, but a pool never changes its kind.
    """

    pages: Float[Array, "pages page_size kv2 head_dim"] | Int8[Array, "pages kv2 page_size head_dim"]
    scales: Float[Array, "pages kv2 page_size"] | None

    @property
    def heads_first(self) -> bool:
        """Whether pages hold heads of tokens."""
        return self.scales is not None

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return int(self.pages.shape[2 if self.heads_first else 1])


# A tree of the same form that holds something else than arrays: shapes, axes.
_pool_of: Any = KVPool


def kv_pool_shapes(config: LlamaConfig, num_pages: int, page_size: int, dtype: Any, num_shards: int = 1) -> KVPool:
    """The shapes and dtypes of a pool with `num_pages` pages of `dtype` on each of `num_shards`."""
    num_pages, kv2 = num_shards * config.num_layers * num_pages, 2 * config.num_kv_heads
    shape, scales = (num_pages, page_size, kv2, config.head_dim), None
    if dtype == jnp.int8:
        shape = (num_pages, kv2, page_size, config.head_dim)
        scales = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    pool: KVPool = _pool_of(jax.ShapeDtypeStruct(shape, dtype), scales)
    return pool


def kv_pool_axes(dtype: Any) -> KVPool:
    """The logical axes of a pool of `dtype` (see `mesh.py`)."""
    axes = ("pages", "kv_heads", "page", "head_dim")
    pool: KVPool = _pool_of(axes, axes[:3])
    if dtype != jnp.int8:
        pool = _pool_of(("pages", "page", "kv_heads", "head_dim"), None)
    return pool


def kv_bytes_per_token(config: LlamaConfig, dtype: Any) -> int:
    """Bytes that one token takes in all layers, scales included."""
    pool = kv_pool_shapes(config, 1, 1, dtype)
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(pool))


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
    num_pages, page_size = pool.pages.shape[0], pool.page_size
    pages = jnp.take_along_axis(page_table, positions[:, None] // page_size, axis=1)[:, 0]
    pages, slots = jnp.where(valid, pages, num_pages), positions % page_size

    def write(old: Array, new: Array) -> Array:
        if pool.heads_first:
            return old.at[pages, :, slots].set(new, mode="drop")
        flat = old.reshape(num_pages * page_size, *old.shape[2:])
        return flat.at[pages * page_size + slots].set(new, mode="drop").reshape(old.shape)

    return jax.tree.map(write, pool, stored(kv, pool))


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
    num_pages, page_size = pool.pages.shape[0], pool.page_size
    chunk_pages = kv.shape[0] // page_size
    pages = jax.lax.dynamic_slice_in_dim(page_table, start // page_size, chunk_pages)
    pages = jnp.where(jnp.arange(chunk_pages) * page_size < num_tokens, pages, num_pages)

    def write(old: Array, new: Array) -> Array:
        new = new.reshape(chunk_pages, page_size, *new.shape[1:])
        return old.at[pages].set(new.swapaxes(1, 2) if pool.heads_first else new, mode="drop")

    return jax.tree.map(write, pool, stored(kv, pool))


def clear_pages(pool: KVPool, pages: Int[Array, " max_pages"], count: Int[Array, ""], num_layers: int) -> KVPool:
    """Zeros in the first `count` of `pages` (numbers of layer 0), in every layer."""

    def clear_in(array: Array) -> Array:
        layers = array.reshape(num_layers, -1, *array.shape[1:])
        zeros = jnp.zeros((num_layers, 1, *array.shape[1:]), array.dtype)

        def clear(index: Array, layers: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(layers, zeros, pages[index], axis=1)

        return jax.lax.fori_loop(0, count, clear, layers).reshape(array.shape)

    return jax.tree.map(clear_in, pool)


def read_pages(pool: KVPool, pages: Int[Array, " some"], num_layers: int) -> KVPool:
    """A copy of `pages` (numbers of layer 0) of every layer, `[layers * some, …]`. Of page 0 it is of no use."""
    index = _in_every_layer(pool, pages, num_layers)
    return jax.tree.map(lambda part: part[index], pool)


def put_pages(pool: KVPool, pages: Int[Array, " some"], copy: KVPool, num_layers: int) -> KVPool:
    """The inverse of `read_pages`. What was read where `pages` is 0 now is left out."""
    index = _in_every_layer(pool, pages, num_layers)
    index = jnp.where(jnp.tile(pages, num_layers) == 0, pool.pages.shape[0], index)
    return jax.tree.map(lambda part, new: part.at[index].set(new, mode="drop"), pool, copy)


def _in_every_layer(pool: KVPool, pages: Array, num_layers: int) -> Array:
    first = jnp.arange(num_layers) * (pool.pages.shape[0] // num_layers)
    return (first[:, None] + pages).ravel()


def stored(kv: Float[Array, "tokens kv2 head_dim"], pool: KVPool) -> KVPool:
    """Tokens as `pool` keeps them, [tokens, 2K, D] and [tokens, 2K]. NaN or infinity makes a scale NaN, which attention
    carries on."""
    if pool.scales is None:
        return KVPool(kv.astype(pool.pages.dtype), None)
    return KVPool(*quantize_rows(kv))
