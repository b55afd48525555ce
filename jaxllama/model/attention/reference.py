"""Paged attention in plain JAX, for any backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllama.model.cache import KVPool, write_pages, write_tokens
from jaxllama.model.linear import precision_of

BLOCK_TOKENS = 128
QUERY_BLOCK = 128
BLOCKS_PER_GROUP = 16
_MASKED = -1e30


@dataclass(frozen=True)
class ReferenceAttention:
    """`Attention` in plain JAX, which XLA partitions."""

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
        window: int | None = None,
    ) -> tuple[Float[Array, "rows heads head_dim"], KVPool]:
        """As `Attention.decode`."""
        pool = write_tokens(pool, kv, page_table, positions, active)
        positions = jnp.where(active, positions, self._idle_position(positions, active, window))
        return self._attend_once(q, pool, page_table, positions, active, window), pool

    def verify(
        self,
        q: Float[Array, "rows tokens heads head_dim"],
        kv: Float[Array, "rows tokens kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        num_tokens: Int[Array, " rows"],
        window: int | None = None,
    ) -> tuple[Float[Array, "rows tokens heads head_dim"], KVPool]:
        """As `Attention.verify`."""
        size = q.shape[1]
        places = positions[:, None] + jnp.arange(size)
        is_real = jnp.arange(size) < num_tokens[:, None]
        table = jnp.repeat(page_table, size, axis=0)
        # Past a page table's end there is nothing to write, and nowhere to look for the page.
        at = jnp.where(is_real, places, 0).ravel()
        pool = write_tokens(pool, kv.reshape(-1, *kv.shape[2:]), table, at, is_real.ravel())
        # As for `decode`; and the last real query stands in for those after it, as in `chunk_positions`.
        active = num_tokens > 0
        none = self._idle_position(positions, active, window)
        last = jnp.where(active, positions + num_tokens - 1, none)
        places = jnp.minimum(jnp.where(active[:, None], places, none), last[:, None])
        return self._attend(q, pool, page_table, places, window), pool

    def prefill(
        self,
        q: Float[Array, "tokens heads head_dim"],
        kv: Float[Array, "tokens kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, " max_pages"],
        start: Int[Array, ""],
        num_tokens: Int[Array, ""],
        window: int | None = None,
    ) -> tuple[Float[Array, "tokens heads head_dim"], KVPool]:
        """As `Attention.prefill`."""
        pool = write_pages(pool, kv, page_table, start, num_tokens)
        positions = chunk_positions(len(q), start, num_tokens)
        return self._attend(q[None], pool, page_table[None], positions[None], window)[0], pool

    def _idle_position(
        self, positions: Int[Array, " rows"], active: Bool[Array, " rows"], window: int | None
    ) -> Int[Array, ""] | int:
        """Where rows attend from that are not active: the others are not to wait for their blocks."""
        return 0 if window is None else jnp.where(active, positions, 0).max()

    def _attend(
        self,
        q: Float[Array, "rows tokens heads head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, "rows tokens"],
        window: int | None,
    ) -> Float[Array, "rows tokens heads head_dim"]:
        return paged_attention(q, pool, page_table, positions, window)

    def _attend_once(
        self,
        q: Float[Array, "rows heads head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        active: Bool[Array, " rows"],
        window: int | None,
    ) -> Float[Array, "rows heads head_dim"]:
        """`_attend` with one query a row."""

        def attend(
            q: Float[Array, "rows heads head_dim"],
            page_table: Int[Array, "rows max_pages"],
            positions: Int[Array, " rows"],
        ) -> Float[Array, "rows heads head_dim"]:
            return self._attend(q[:, None], pool, page_table, positions[:, None], window)[:, 0]

        rows = (q, page_table, positions)
        if len(q) != 2:
            return attend(*rows)
        # The fewest that are decoded: one request alone should not pay for two.
        first = jnp.argmax(active)
        one = [jax.lax.dynamic_slice_in_dim(x, first, 1) for x in rows]
        out: Array = jax.lax.cond(active.all(), lambda: attend(*rows), lambda: jnp.broadcast_to(attend(*one), q.shape))
        return out


@dataclass(frozen=True)
class KernelAttention(ReferenceAttention):
    """`Attention` whose `_attend` is a kernel, which walks each row by itself: a row too many costs next to nothing."""

    def _attend_once(
        self,
        q: Float[Array, "rows heads head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        active: Bool[Array, " rows"],
        window: int | None,
    ) -> Float[Array, "rows heads head_dim"]:
        return self._attend(q[:, None], pool, page_table, positions[:, None], window)[:, 0]


def chunk_positions(size: int, start: Int[Array, ""], num_tokens: Int[Array, ""]) -> Int[Array, " size"]:
    """Positions of a chunk's tokens. Padding repeats the last: attention then reads nothing past it, where pages may
    hold a failed row's NaN."""
    return start + jnp.minimum(jnp.arange(size), jnp.maximum(num_tokens - 1, 0))


def paged_attention(
    q: Float[Array, "rows tokens heads head_dim"],
    pool: KVPool,
    page_table: Int[Array, "rows max_pages"],
    positions: Int[Array, "rows tokens"],
    window: int | None = None,
) -> Float[Array, "rows tokens heads head_dim"]:
    """Each query attends to its row's keys at positions up to its own, the last `window` of them (None: all).

    Walks the pages in blocks of `BLOCK_TOKENS` with an online softmax, up to the last position asked for. A block past
    a row's own end leaves its sums as they are, bit for bit, so a row's result does not depend on how long the others
    are. Of a chunk, all queries take together the blocks that all of them see whole; those that remain are
    taken by `QUERY_BLOCK` queries at a time, so that early ones do not visit late keys.

    `page_table` holds pages of the layer that is read (already offset). `positions` are 0 or more and do not
    fall in a row. Scores and sums are float32. Of an int8 pool the integers are multiplied, which `q`'s dtype holds
    exactly, and the scales go to scores and probabilities.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Kwon et al. 2023, arXiv:2309.06180 (pages).
    """
    rows, tokens, heads, head_dim = q.shape
    pages_per_block = max(1, min(BLOCK_TOKENS // pool.page_size, page_table.shape[1]))
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_block)))
    block = pages_per_block * pool.page_size
    walk = partial(_walk, pool, page_table, pages_per_block, window)
    shape = (rows, heads, tokens)
    sums = _Sums(jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    end = positions[:, -1].max() // block + 1

    def first(positions: Int[Array, "rows some"]) -> Int[Array, ""] | int:
        """The first block that any of the queries sees."""
        return 0 if window is None else jnp.maximum(positions.min() - window + 1, 0) // block

    if tokens == 1:
        at_once = max(1, min(BLOCKS_PER_GROUP // rows, page_table.shape[1] // pages_per_block))
        done = first(positions)
        if at_once > 1:
            start, done = done // at_once, end // at_once * at_once
            sums = walk(q, positions, start, end // at_once, sums, num_blocks=at_once)
        return _result(walk(q, positions, done, end, sums), q.dtype)
    whole = (positions[:, 0].min() + 1) // block
    # Without the mask between them, a score's scale and the subtraction of the largest would be one operation with
    # another rounding than elsewhere.
    if window is None:
        sums = walk(q, positions, 0, whole, sums, is_whole=pool.scales is None)
    if tokens <= QUERY_BLOCK or tokens % QUERY_BLOCK:
        start = whole if window is None else first(positions)
        return _result(walk(q, positions, start, end, sums), q.dtype)

    def split(x: Shaped[Array, "*shape"], axis: int) -> Shaped[Array, " blocks *block"]:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, QUERY_BLOCK, *x.shape[axis + 1 :]), axis, 0)

    def rest(
        part: tuple[Float[Array, "rows some heads head_dim"], Int[Array, "rows some"], _Sums],
    ) -> Float[Array, "rows some heads head_dim"]:
        q, positions, sums = part
        start = whole if window is None else first(positions)
        return _result(walk(q, positions, start, positions[:, -1].max() // block + 1, sums), q.dtype)

    parts = (split(q, 1), split(positions, 1), jax.tree.map(lambda x: split(x, 2), sums))
    return jnp.moveaxis(jax.lax.map(rest, parts), 0, 1).reshape(q.shape)


class _Sums(NamedTuple):
    """What queries have seen so far: the largest score, and the sums of probabilities relative to it and of values
    weighted with them."""

    largest: Float[Array, "rows heads tokens"]
    total: Float[Array, "rows heads tokens"]
    weighted: Float[Array, "rows heads tokens head_dim"]


def _result(sums: _Sums, dtype: Any) -> Float[Array, "rows tokens heads head_dim"]:
    return (sums.weighted / sums.total[..., None]).astype(dtype).transpose(0, 2, 1, 3)


def _walk(
    pool: KVPool,
    page_table: Int[Array, "rows max_pages"],
    pages_per_block: int,
    window: int | None,
    q: Float[Array, "rows tokens heads head_dim"],
    positions: Int[Array, "rows tokens"],
    start: Int[Array, ""] | int,
    end: Int[Array, ""],
    sums: _Sums,
    *,
    num_blocks: int = 1,
    is_whole: bool = False,
) -> _Sums:
    """Adds the blocks of rounds `start … end` to `sums`, `num_blocks` a round; with the same bits whatever that is.

    `is_whole`: every query sees all of them.
    """
    rows, tokens, _, head_dim = q.shape
    kv_heads = pool.pages.shape[1 if pool.heads_first else 2] // 2
    num_pages = num_blocks * pages_per_block
    size = num_pages * pool.page_size
    products = (_one_query_products if tokens == 1 else _chunk_products)(q, kv_heads, num_blocks)
    scale = head_dim**-0.5 * math.log2(math.e)

    def visit(index: Int[Array, ""], sums: _Sums) -> _Sums:
        pages = jax.lax.dynamic_slice_in_dim(page_table, index * num_pages, num_pages, axis=1)
        kv_positions = index * size + jnp.arange(size)
        is_own: Array | None = None if is_whole else kv_positions <= positions[:, -1:]
        if is_own is not None and window is not None:
            # Pages before the window may be another row's by now.
            is_own &= kv_positions > positions[:, :1] - window
        kv, scales = _read(pool, pages, is_own, q)
        scores = scales.of_keys(products.scores(kv))
        if not is_whole:
            visible = kv_positions <= positions[:, :, None]
            if window is not None:
                visible &= kv_positions > positions[:, :, None] - window
            visible = visible.reshape(rows, tokens, num_blocks, -1).swapaxes(1, 2)[:, :, None]
            scores = jnp.where(visible, scores, _MASKED)
        # Without a window every row sees position 0: from the first block on `largest` is a score, masked ones give 0.
        block_largest = _fold(jnp.maximum, jnp.max, scores)
        largest = [sums.largest]
        for i in range(num_blocks):
            largest.append(jnp.maximum(largest[-1], block_largest[:, i]))
        probs = _exp2((scores - jnp.stack(largest[1:], 1)[..., None]) * scale)
        if window is not None:
            probs = jnp.where(visible, probs, 0)
        probs = jax.lax.optimization_barrier(probs.astype(kv.dtype))
        totals = _fold(jnp.add, jnp.sum, probs.astype(jnp.float32))
        outs = products.weighted(scales.of_values(probs).astype(kv.dtype), kv)
        _, total, weighted = sums
        for i in range(num_blocks):
            decay = _exp2((largest[i] - largest[i + 1]) * scale)
            total = total * decay + totals[:, i]
            weighted = weighted * decay[..., None] + outs[:, i]
        return _Sums(largest[-1], total, weighted)

    return jax.lax.fori_loop(start, end, visit, sums)


def _fold(
    combine: Callable[[Array, Array], Array], reduce: Callable[..., Array], x: Float[Array, "*batch width"]
) -> Float[Array, "*batch"]:
    """Reduces the last dimension, by halves at first: XLA's reductions of rows take 3 to 20 times as long on CPUs."""
    while (size := x.shape[-1]) > 16 and size % 2 == 0:
        x = combine(x[..., : size // 2], x[..., size // 2 :])
    return reduce(x, axis=-1)


def _exp2(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^x for x ≤ 0, to 2e-7 of it: 1 at 0, and 0 from -127 on. NaN stays NaN.

    Rounded to bfloat16 it takes 0.6 of XLA's time on CPUs. The polynomial is the least-maximum fit of its degree to 2^f
    for |f| ≤ 1/2 among those that are 1 at 0.
    """
    x = jnp.maximum(x, -127.0)
    shifted = x + 1.5 * 2.0**23  # the sum's low bits are the nearest integer
    f = x - (shifted - 1.5 * 2.0**23)
    p = jnp.full_like(f, 0.001326472731307149)
    for c in (0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0):
        p = p * f + c
    bits = jax.lax.bitcast_convert_type(p, jnp.int32) + (jax.lax.bitcast_convert_type(shifted, jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


class _Scales(NamedTuple):
    """Multiply scores and probabilities, [rows, blocks, heads, tokens, block], by the scales of keys and values."""

    of_keys: Callable[[Array], Array]
    of_values: Callable[[Array], Array]


def _read(
    pool: KVPool,
    pages: Int[Array, "rows num_pages"],
    is_own: Bool[Array, "rows size"] | None,
    q: Float[Array, "rows tokens heads head_dim"],
) -> tuple[Float[Array, "rows size kv2 head_dim"], _Scales]:
    """Blocks of every row, and their scales. `is_own` None: all are."""

    def read(part: Shaped[Array, " pages *page"]) -> Shaped[Array, "rows size *token"]:
        part = part.at[pages].get(mode="promise_in_bounds")
        part = part.swapaxes(2, 3) if pool.heads_first else part
        part = part.reshape(len(pages), -1, *part.shape[3:])
        if is_own is None:
            return part
        # Pages are reused without being cleared; 0 × NaN would carry a failed row's values into another's.
        return jnp.where(is_own.reshape(*is_own.shape, *[1] * (part.ndim - 2)), part, 0)

    kv, scales = jax.tree.map(read, pool)
    if scales is None:
        return kv, _Scales(lambda scores: scores, lambda probs: probs)

    def multiply(
        x: Float[Array, "rows blocks heads tokens block"], scales: Float[Array, "rows size kv"]
    ) -> Float[Array, "rows blocks heads tokens block"]:
        per_head = scales.reshape(len(pages), x.shape[1], -1, scales.shape[2]).swapaxes(2, 3)
        return x * jnp.repeat(per_head, x.shape[2] // scales.shape[2], axis=2)[:, :, :, None]

    return kv.astype(q.dtype), _Scales(
        lambda scores: multiply(scores, scales[:, :, 0::2]), lambda probs: multiply(probs, scales[:, :, 1::2])
    )


class _Products(NamedTuple):
    """The two matrix products of attention over blocks of the cache, `kv` [rows, size, 2K, D], in float32.

    `scores(kv)` is [rows, blocks, heads, tokens, block], `weighted(probs, kv)` [rows, blocks, heads, tokens, head_dim].
    """

    scores: Callable[[Array], Array]
    weighted: Callable[[Array, Array], Array]


def _chunk_products(q: Float[Array, "rows tokens heads head_dim"], kv_heads: int, num_blocks: int) -> _Products:
    """For many queries a row, a block at a time: one product a KV head, which its query heads share."""
    assert num_blocks == 1
    rows, tokens, heads, head_dim = q.shape
    precision = precision_of(q.dtype)
    grouped = q.transpose(0, 2, 1, 3).reshape(rows, kv_heads, heads // kv_heads * tokens, head_dim)

    def scores(kv: Float[Array, "rows size kv2 head_dim"]) -> Float[Array, "rows blocks heads tokens block"]:
        out = jnp.einsum(
            "bkqd,btkd->bkqt", grouped, kv[:, :, 0::2], preferred_element_type=jnp.float32, precision=precision
        )
        return out.reshape(rows, 1, heads, tokens, -1)

    def weighted(
        probs: Float[Array, "rows blocks heads tokens block"], kv: Float[Array, "rows size kv2 head_dim"]
    ) -> Float[Array, "rows blocks heads tokens head_dim"]:
        probs = probs.reshape(rows, kv_heads, -1, probs.shape[-1])
        out = jnp.einsum(
            "bkqt,btkd->bkqd", probs, kv[:, :, 1::2], preferred_element_type=jnp.float32, precision=precision
        )
        return out.reshape(rows, 1, heads, tokens, head_dim)

    return _Products(scores, weighted)


def _one_query_products(q: Float[Array, "rows 1 heads head_dim"], kv_heads: int, num_blocks: int) -> _Products:
    """For one query a row: one product a block over all keys and values, in the order in which pages hold them.

    A query is padded with zeros to the width of a token, 2K × D, and of the values only its own head's are taken. That
    is 2K times the arithmetic, but a step waits for memory, and on a CPU taking the heads apart, a transpose of every
    page, took twice the time (bench/LOG.md).
    """
    rows, _, heads, head_dim = q.shape
    group, width = heads // kv_heads, 2 * kv_heads * head_dim
    precision = precision_of(q.dtype)
    is_own_key = (jnp.arange(2 * kv_heads) == 2 * (jnp.arange(heads)[:, None] // group)).astype(q.dtype)
    wide = (q[:, 0, :, None, :] * is_own_key[:, :, None]).reshape(rows, heads, width)
    wide = jnp.repeat(wide, num_blocks, axis=0)

    def scores(kv: Float[Array, "rows size kv2 head_dim"]) -> Float[Array, "rows blocks heads tokens block"]:
        flat = kv.reshape(rows * num_blocks, -1, width)
        out = jnp.einsum("bhc,btc->bht", wide, flat, preferred_element_type=jnp.float32, precision=precision)
        return out.reshape(rows, num_blocks, heads, 1, -1)

    def weighted(
        probs: Float[Array, "rows blocks heads tokens block"], kv: Float[Array, "rows size kv2 head_dim"]
    ) -> Float[Array, "rows blocks heads tokens head_dim"]:
        flat = kv.reshape(rows * num_blocks, -1, width)
        probs = probs.reshape(rows * num_blocks, heads, -1)
        out = jnp.einsum("bht,btc->bhc", probs, flat, preferred_element_type=jnp.float32, precision=precision)
        out = out.reshape(rows, num_blocks, kv_heads, group, 2 * kv_heads, head_dim)
        own_values = [out[:, :, head, :, 2 * head + 1] for head in range(kv_heads)]
        return jnp.concatenate(own_values, axis=2)[:, :, :, None]

    return _Products(scores, weighted)
