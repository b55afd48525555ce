"""Paged attention in plain JAX, for any backend."""

from __future__ import annotations

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
    rows, tokens, heads, head_dim = q.shape
    page_size, kv_heads = pool.shape[1], pool.shape[2] // 2
    group = heads // kv_heads
    pages_per_block = max(1, min(BLOCK_TOKENS // page_size, page_table.shape[1]))
    block = pages_per_block * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_block)))
    # Scaled in float32; a bfloat16 q would round twice.
    scale = head_dim**-0.5
    q = q.reshape(rows, tokens, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * tokens, head_dim)

    def visit(
        index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest, total, weighted = carry
        pages = jax.lax.dynamic_slice_in_dim(page_table, index * pages_per_block, pages_per_block, axis=1)
        kv = pool[pages].reshape(rows, block, kv_heads, 2, head_dim)
        kv_positions = index * block + jnp.arange(block)
        visible = kv_positions <= positions[:, None, None, :, None]
        # Pages are reused without being cleared; 0 × NaN would carry a failed row's values into another's.
        seen = kv_positions <= positions.max(axis=1)[:, None]
        v = jnp.where(seen[:, :, None, None], kv[:, :, :, 1], 0)
        scores = jnp.einsum("bkqd,btkd->bkqt", q, kv[:, :, :, 0], preferred_element_type=jnp.float32) * scale
        visible = jnp.broadcast_to(visible, (rows, 1, group, tokens, block)).reshape(rows, 1, group * tokens, block)
        scores = jnp.where(visible, scores, _MASKED)
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        probs = jnp.where(visible, jnp.exp(scores - new_largest[..., None]), 0)
        decay = jnp.exp(largest - new_largest)
        products = jnp.einsum("bkqt,btkd->bkqd", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_largest, total * decay + probs.sum(axis=-1), weighted * decay[..., None] + products

    shape = (rows, kv_heads, group * tokens)
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    num_blocks = jnp.maximum(positions.max(), 0) // block + 1
    _, total, weighted = jax.lax.fori_loop(0, num_blocks, visit, start)
    out = (weighted / total[..., None]).astype(q.dtype)
    return (
        out.reshape(rows, kv_heads, group, tokens, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(rows, tokens, heads, head_dim)
    )
