"""Paged attention in plain JAX, for any backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllama.cache import KVPool, write_pages, write_tokens

BLOCK_TOKENS = 128
QUERY_BLOCK = 128
_MASKED = -1e30


@dataclass(frozen=True)
class ReferenceAttention:
    """`Attention` in plain JAX, which XLA partitions."""

    page_size = 16
    chunk_sizes = (32, 128, 512)
    needs_clean_pages = False
    keeps_float32 = True
    layers_per_loop = None

    def validate(self, *, page_size: int, num_rows: int, table_width: int) -> None:
        """Any will do."""

    def decode(
        self,
        q: Float[Array, "rows heads head_dim"],
        kv: Float[Array, "rows kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        active: Bool[Array, " rows"],
    ) -> tuple[Float[Array, "rows heads head_dim"], KVPool]:
        """As `Attention.decode`."""
        pool = write_tokens(pool, kv, page_table, positions, active)
        # Rows that are not active would only make the others wait for their blocks.
        positions = jnp.where(active, positions, 0)
        return paged_attention(q[:, None], pool, page_table, positions[:, None])[:, 0], pool

    def prefill(
        self,
        q: Float[Array, "tokens heads head_dim"],
        kv: Float[Array, "tokens kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, " max_pages"],
        start: Int[Array, ""],
        num_tokens: Int[Array, ""],
    ) -> tuple[Float[Array, "tokens heads head_dim"], KVPool]:
        """As `Attention.prefill`."""
        pool = write_pages(pool, kv, page_table, start, num_tokens)
        positions = chunk_positions(len(q), start, num_tokens)
        return paged_attention(q[None], pool, page_table[None], positions[None])[0], pool


def chunk_positions(size: int, start: Int[Array, ""], num_tokens: Int[Array, ""]) -> Int[Array, " size"]:
    """Positions of a chunk's tokens. Padding repeats the last: attention then reads nothing past it, where pages may
    hold a failed row's NaN."""
    return start + jnp.minimum(jnp.arange(size), jnp.maximum(num_tokens - 1, 0))


def paged_attention(
    q: Float[Array, "rows tokens heads head_dim"],
    pool: KVPool,
    page_table: Int[Array, "rows max_pages"],
    positions: Int[Array, "rows tokens"],
) -> Float[Array, "rows tokens heads head_dim"]:
    """Each query attends to its row's keys at positions up to its own.

    Walks the pages in blocks of `BLOCK_TOKENS` with an online softmax, up to the last position asked for. A block past
    a row's own end leaves its accumulator as it is, bit for bit, so a row's result does not depend on how long
    the others are. A long chunk's queries are taken `QUERY_BLOCK` at a time, so that early ones do not visit late keys.

    `page_table` holds pages of the layer that is read (already offset). `positions` are 0 or more and do not
    fall in a row. Scores and sums are float32. Of an int8 pool the integers are multiplied, which `q`'s dtype holds
    exactly, and the scales go to scores and probabilities.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Kwon et al. 2023, arXiv:2309.06180 (pages).
    """
    rows, tokens, heads, head_dim = q.shape
    if tokens <= QUERY_BLOCK or tokens % QUERY_BLOCK:
        return _attend(q, pool, page_table, positions)
    blocks = q.reshape(rows, -1, QUERY_BLOCK, heads, head_dim).swapaxes(0, 1)
    block_positions = positions.reshape(rows, -1, QUERY_BLOCK).swapaxes(0, 1)
    out = jax.lax.map(lambda block: _attend(block[0], pool, page_table, block[1]), (blocks, block_positions))
    return out.swapaxes(0, 1).reshape(q.shape)


def _attend(q: Array, pool: KVPool, page_table: Array, positions: Array) -> Array:
    rows, tokens, heads, head_dim = q.shape
    page_size = pool.page_size
    kv_heads = pool.pages.shape[1 if pool.heads_first else 2] // 2
    pages_per_block = max(1, min(BLOCK_TOKENS // page_size, page_table.shape[1]))
    block = pages_per_block * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_block)))
    last = positions.max(axis=1)
    products = _one_query_products(q, kv_heads) if tokens == 1 else _chunk_products(q, kv_heads)

    def visit(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, weighted = carry
        pages = jax.lax.dynamic_slice_in_dim(page_table, index * pages_per_block, pages_per_block, axis=1)
        kv_positions = index * block + jnp.arange(block)
        kv, scales = _read(pool, pages, kv_positions <= last[:, None], q)
        visible = (kv_positions <= positions[:, :, None])[:, None]
        scores = jnp.where(visible, scales.of_keys(products.scores(kv)) * head_dim**-0.5, _MASKED)
        # Every row sees position 0, so from the first block on `new_largest` is a score and masked ones become 0.
        new_largest = jnp.maximum(largest, scores.max(axis=-1))
        probs = jnp.exp(scores - new_largest[..., None])
        decay = jnp.exp(largest - new_largest)
        weighted = weighted * decay[..., None] + products.weighted(scales.of_values(probs).astype(kv.dtype), kv)
        return new_largest, total * decay + probs.sum(axis=-1), weighted

    shape = (rows, heads, tokens)
    start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    num_blocks = jnp.maximum(last.max(), 0) // block + 1
    _, total, weighted = jax.lax.fori_loop(0, num_blocks, visit, start)
    return (weighted / total[..., None]).astype(q.dtype).transpose(0, 2, 1, 3)


class _Scales(NamedTuple):
    """Multiply scores and probabilities, [rows, heads, tokens, block], by the scales of keys and values."""

    of_keys: Callable[[Array], Array]
    of_values: Callable[[Array], Array]


def _read(pool: KVPool, pages: Array, is_own: Array, q: Array) -> tuple[Array, _Scales]:
    """A block of every row, [rows, block, 2K, D], and its scales. `is_own`: [rows, block]."""

    def read(part: Array) -> Array:
        part = part.at[pages].get(mode="promise_in_bounds")
        part = part.swapaxes(2, 3) if pool.heads_first else part
        part = part.reshape(*is_own.shape, *part.shape[3:])
        # Pages are reused without being cleared; 0 × NaN would carry a failed row's values into another's.
        return jnp.where(is_own.reshape(*is_own.shape, *[1] * (part.ndim - 2)), part, 0)

    kv, scales = jax.tree.map(read, pool)
    if scales is None:
        return kv, _Scales(lambda scores: scores, lambda probs: probs)
    num_queries = 2 * q.shape[2] // scales.shape[2]
    of_keys, of_values = (jnp.repeat(scales[:, :, i::2], num_queries, axis=2).swapaxes(1, 2) for i in (0, 1))
    return kv.astype(q.dtype), _Scales(
        lambda scores: scores * of_keys[:, :, None], lambda probs: probs * of_values[:, :, None]
    )


class _Products(NamedTuple):
    """The two matrix products of attention over a block of the cache, [rows, block, 2K, D], in float32.

    `scores(kv)` is [rows, heads, tokens, block]; `weighted(probs, kv)` is [rows, heads, tokens, head_dim].
    """

    scores: Callable[[Array], Array]
    weighted: Callable[[Array, Array], Array]


def _chunk_products(q: Float[Array, "rows tokens heads head_dim"], kv_heads: int) -> _Products:
    """For many queries a row: one product a KV head, which its query heads share."""
    rows, tokens, heads, head_dim = q.shape
    grouped = q.transpose(0, 2, 1, 3).reshape(rows, kv_heads, heads // kv_heads * tokens, head_dim)

    def scores(kv: Array) -> Array:
        out = jnp.einsum("bkqd,btkd->bkqt", grouped, kv[:, :, 0::2], preferred_element_type=jnp.float32)
        return out.reshape(rows, heads, tokens, -1)

    def weighted(probs: Array, kv: Array) -> Array:
        probs = probs.reshape(rows, kv_heads, -1, probs.shape[-1])
        out = jnp.einsum("bkqt,btkd->bkqd", probs, kv[:, :, 1::2], preferred_element_type=jnp.float32)
        return out.reshape(rows, heads, tokens, head_dim)

    return _Products(scores, weighted)


def _one_query_products(q: Float[Array, "rows 1 heads head_dim"], kv_heads: int) -> _Products:
    """For one query a row: one product a row over all keys and values, in the order in which pages hold them.

    A query is padded with zeros to the width of a token, 2K × D, and of the values only its own head's are taken. That
    is 2K times the arithmetic, but a step waits for memory, and on a CPU taking the heads apart, a transpose of every
    page, took twice the time (bench/LOG.md).
    """
    rows, _, heads, head_dim = q.shape
    group, width = heads // kv_heads, 2 * kv_heads * head_dim
    is_own_key = (jnp.arange(2 * kv_heads) == 2 * (jnp.arange(heads)[:, None] // group)).astype(q.dtype)
    wide = (q[:, 0, :, None, :] * is_own_key[:, :, None]).reshape(rows, heads, width)

    def scores(kv: Array) -> Array:
        flat = kv.reshape(rows, -1, width)
        return jnp.einsum("bhc,btc->bht", wide, flat, preferred_element_type=jnp.float32)[:, :, None]

    def weighted(probs: Array, kv: Array) -> Array:
        flat = kv.reshape(rows, -1, width)
        out = jnp.einsum("bht,btc->bhc", probs[:, :, 0], flat, preferred_element_type=jnp.float32)
        out = out.reshape(rows, kv_heads, group, 2 * kv_heads, head_dim)
        own_values = [out[:, head, :, 2 * head + 1] for head in range(kv_heads)]
        return jnp.concatenate(own_values, axis=1)[:, :, None]

    return _Products(scores, weighted)
