"""Paged attention in plain JAX, for any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllama.cache import KVPool

BLOCK_TOKENS = 256
_MASKED = -1e30


def paged_attention(
    q: Float[Array, "rows tokens heads head_dim"],
    pool: KVPool,
    page_table: Int[Array, "rows max_pages"],
    positions: Int[Array, "rows tokens"],
) -> Float[Array, "rows tokens heads head_dim"]:
    """Each query attends to its row's keys at positions up to its own.

    Walks the pages in blocks of at most `BLOCK_TOKENS` tokens with an online softmax, up to the last position asked for.
    A block past a row's own end leaves its accumulator as it is, bit for bit, so that a row's result does not depend on
    how long the others are. Positions below 0 give unspecified values.

    `page_table` holds pages of the layer that is read (already offset). Scores and sums are float32.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Kwon et al. 2023, arXiv:2309.06180 (pages).
    """
    page_size = pool.shape[1]
    pages_per_block = max(1, min(BLOCK_TOKENS // page_size, page_table.shape[1]))
    block = pages_per_block * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_block)))
    last = positions.max(axis=1)
    products = _one_query_products(q, pool) if q.shape[1] == 1 else _chunk_products(q, pool)

    def visit(index: jax.Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, weighted = carry
        pages = jax.lax.dynamic_slice_in_dim(page_table, index * pages_per_block, pages_per_block, axis=1)
        kv_positions = index * block + jnp.arange(block)
        # Pages are reused without being cleared; 0 × NaN would carry a failed row's values into another's.
        is_written = kv_positions <= last[:, None]
        kv = jnp.where(is_written[:, :, None, None], pool[pages].reshape(q.shape[0], block, *pool.shape[2:]), 0)
        visible = (kv_positions <= positions[:, :, None])[:, None]
        scores = jnp.where(visible, products.scores(kv), _MASKED)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        probs = jnp.where(visible, jnp.exp(scores - new_largest[..., None]), 0)
        decay = jnp.exp(largest - new_largest)
        weighted = weighted * decay[..., None] + products.weighted(probs.astype(pool.dtype), kv)
        return new_largest, total * decay + probs.sum(axis=-1), weighted

    shape = (q.shape[0], q.shape[2], q.shape[1])
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, q.shape[3])))
    num_blocks = jnp.maximum(last.max(), 0) // block + 1
    _, total, weighted = jax.lax.fori_loop(0, num_blocks, visit, start)
    return (weighted / total[..., None]).astype(q.dtype).transpose(0, 2, 1, 3)


class _Products(NamedTuple):
    """The two matrix products of attention over a block `kv` [rows, block, 2K, D], in float32.

    `scores(kv)` is [rows, heads, tokens, block], scaled; `weighted(probs, kv)` is [rows, heads, tokens, head_dim].
    """

    scores: Callable[[Array], Array]
    weighted: Callable[[Array, Array], Array]


def _chunk_products(q: Float[Array, "rows tokens heads head_dim"], pool: KVPool) -> _Products:
    """For many queries a row: one product a KV head, whose query heads share it."""
    rows, tokens, heads, head_dim = q.shape
    kv_heads = pool.shape[2] // 2
    grouped = q.transpose(0, 2, 1, 3).reshape(rows, kv_heads, heads // kv_heads * tokens, head_dim)

    def scores(kv: Array) -> Array:
        out = jnp.einsum("bkqd,btkd->bkqt", grouped, kv[:, :, 0::2], preferred_element_type=jnp.float32)
        return out.reshape(rows, heads, tokens, -1) * head_dim**-0.5

    def weighted(probs: Array, kv: Array) -> Array:
        probs = probs.reshape(rows, kv_heads, -1, probs.shape[-1])
        out = jnp.einsum("bkqt,btkd->bkqd", probs, kv[:, :, 1::2], preferred_element_type=jnp.float32)
        return out.reshape(rows, heads, tokens, head_dim)

    return _Products(scores, weighted)


def _one_query_products(q: Float[Array, "rows 1 heads head_dim"], pool: KVPool) -> _Products:
    """For one query a row: one product a row over all heads' keys and values, in the order in which pages hold them.

    A query is padded with zeros to the width of a token's 2K × D, and of the values only its own head's are taken. That
    is 2K times the arithmetic, but a step waits for memory: taking the heads apart, a transpose of every page, made the
    step of 16 rows about 1.7 times as slow on a CPU.
    """
    rows, _, heads, head_dim = q.shape
    kv2 = pool.shape[2]
    group = heads // (kv2 // 2)
    key_of_head = 2 * (jnp.arange(heads) // group)
    is_key = (jnp.arange(kv2) == key_of_head[:, None]).astype(q.dtype)
    wide = (q[:, 0, :, None, :] * is_key[:, :, None]).reshape(rows, heads, kv2 * head_dim)

    def scores(kv: Array) -> Array:
        flat = kv.reshape(rows, -1, kv2 * head_dim)
        out = jnp.einsum("bhc,btc->bht", wide, flat, preferred_element_type=jnp.float32)
        return out[:, :, None] * head_dim**-0.5

    def weighted(probs: Array, kv: Array) -> Array:
        flat = kv.reshape(rows, -1, kv2 * head_dim)
        out = jnp.einsum("bht,btc->bhc", probs[:, :, 0], flat, preferred_element_type=jnp.float32)
        out = out.reshape(rows, heads, kv2, head_dim)
        return jnp.take_along_axis(out, key_of_head[None, :, None, None] + 1, axis=2)

    return _Products(scores, weighted)
