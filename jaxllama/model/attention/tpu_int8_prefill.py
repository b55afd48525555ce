"""Attention of a chunk over an int8 cache on TPUs: a Pallas kernel that reads the row's pages as int8.

Each KV head's pages pass once for every block of queries, in pairs of buffers, and scales go to scores and
probabilities: no page is copied to bfloat16. The chunk's own tokens are in their pages already.

Source: Dao et al. 2022, arXiv:2205.14135 (blocks of queries and keys with an online softmax).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxllama.model.cache import KVPool

BLOCK_PAGES = 4
"""Pages that are computed together."""
_BLOCK_ROWS = 512
"""Query heads times tokens that share a pass over the keys."""
_MIN_TOKENS = 16
_MASKED = -1e30


def attend_chunk(
    q: Float[Array, "tokens heads width"],
    pool: KVPool,
    page_table: Int[Array, " max_pages"],
    start: Int[Array, ""],
    num_tokens: Int[Array, ""],
    *,
    scale: float,
    per_row: int,
    window: int | None,
    interpret: bool,
) -> Float[Array, "tokens heads width"]:
    """What each query from position `start` on sees, of which `num_tokens` are real; of others it means nothing.

    A KV head of the pool may stand for `per_row` side by side (`HeadLayout`), of which each has as many query heads.
    Scores are multiplied by `scale`. Of blocks of pages, none is read that lies before all of their windows.
    """
    assert pool.scales is not None
    tokens, heads, width = q.shape
    kv2, page_size = pool.pages.shape[1:3]
    kv_heads, group = kv2 // 2, 2 * heads // kv2
    # A power of two, as chunks are multiples of.
    block = min(tokens, max(_MIN_TOKENS, 1 << (_BLOCK_ROWS // group).bit_length() - 1))
    grouped = q.reshape(tokens, kv_heads, group, width).transpose(1, 2, 0, 3)
    of_block = pl.BlockSpec((1, group, block, width), lambda head, part, *_: (head, 0, part, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        partial(_kernel, scale=scale, per_row=per_row, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(kv_heads, tokens // block),
            in_specs=[of_block, in_hbm, in_hbm],
            out_specs=of_block,
            scratch_shapes=[
                pltpu.VMEM((2, BLOCK_PAGES, 2, page_size, width), jnp.int8),
                pltpu.VMEM((2, BLOCK_PAGES, kv2 * per_row, page_size), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=32 * 2**20
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="int8_paged_prefill",
    )(page_table, jnp.stack((start, num_tokens)), grouped, pool.pages, pool.scales)
    return out.transpose(2, 0, 1, 3).reshape(q.shape)


def _kernel(
    table: Any,
    bounds: Any,
    q: Any,
    pages: Any,
    scales: Any,
    out: Any,
    page_buffers: Any,
    scale_buffers: Any,
    sems: Any,
    *,
    scale: float,
    per_row: int,
    window: int | None,
) -> None:
    head, part = pl.program_id(0), pl.program_id(1)
    _, group, size, width = q.shape
    page_size, rows = pages.shape[2], group * size
    keys = BLOCK_PAGES * page_size
    start, end = bounds[0], bounds[0] + bounds[1]
    first = start + part * size
    last = jnp.minimum(first + size, end) - 1
    num_blocks = jnp.where(first < end, last // keys + 1, 0)
    first_block = 0 if window is None else jnp.maximum(first - window + 1, 0) // keys

    def copies(block: Any, slot: Any) -> Iterator[tuple[Any, Any]]:
        for i in range(BLOCK_PAGES):
            index = block * BLOCK_PAGES + i

            def both(i: int = i, index: Any = index) -> Iterator[Any]:
                page = table[index]
                own = pages.at[page, pl.ds(2 * head, 2)]
                yield pltpu.make_async_copy(own, page_buffers.at[slot, i], sems.at[slot, 0])
                # All heads': a part of them is no whole tile.
                yield pltpu.make_async_copy(scales.at[page], scale_buffers.at[slot, i], sems.at[slot, 1])

            yield both, index * page_size <= last

    def begin(block: Any, slot: Any) -> None:
        for both, is_needed in copies(block, slot):

            @pl.when(is_needed)
            def _(both: Any = both) -> None:
                for copy in both():
                    copy.start()

    def wait(block: Any, slot: Any) -> None:
        for both, is_needed in copies(block, slot):

            @pl.when(is_needed)
            def _(both: Any = both) -> None:
                for copy in both():
                    copy.wait()

    queries = q[0].reshape(rows, width)
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, page_size), 0)
    limit = jnp.minimum(first + jax.lax.rem(row, size), end - 1)
    of_query = row // (rows // per_row)
    key = jax.lax.broadcasted_iota(jnp.int32, (rows, page_size), 1)

    def page(slot: Any, i: int, kind: int) -> tuple[Any, Any]:
        values = page_buffers[slot, i, kind].astype(jnp.float32).astype(queries.dtype)
        at = (2 * head + kind) * per_row
        own = scale_buffers[slot, i, pl.ds(at, 1)]
        for other in range(1, per_row):
            own = jnp.where(of_query == other, scale_buffers[slot, i, pl.ds(at + other, 1)], own)
        return values, own

    def visit(block: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        largest, total, weighted = carry
        slot = jax.lax.rem(block, 2)

        @pl.when(block + 1 < num_blocks)
        def _() -> None:
            begin(block + 1, 1 - slot)

        wait(block, slot)
        scores, visible = [], []
        for i in range(BLOCK_PAGES):
            values, own = page(slot, i, 0)
            product = jax.lax.dot_general(queries, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            at = key + (block * keys + i * page_size)
            visible.append(at <= limit if window is None else (at <= limit) & (at > limit - window))
            # Where nothing is visible, buffers hold whatever was there, a scale of NaN perhaps.
            scores.append(jnp.where(visible[i], product * (own * scale), _MASKED))
        new_largest = largest
        for some in scores:
            new_largest = jnp.maximum(new_largest, some.max(axis=1, keepdims=True))
        decay = jnp.exp(largest - new_largest)
        total, weighted = total * decay, weighted * decay
        for i in range(BLOCK_PAGES):
            values, own = page(slot, i, 1)
            probs = jnp.exp(scores[i] - new_largest)
            total += probs.sum(axis=1, keepdims=True)
            shares = jnp.where(visible[i], probs * own, 0.0).astype(queries.dtype)
            weighted += jax.lax.dot_general(
                shares, values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return new_largest, total, weighted

    @pl.when(num_blocks > 0)
    def begin_first() -> None:
        begin(first_block, jax.lax.rem(first_block, 2))

    nothing = (
        jnp.full((rows, 1), _MASKED, jnp.float32),
        jnp.zeros((rows, 1), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    _, total, weighted = jax.lax.fori_loop(first_block, num_blocks, visit, nothing)
    out[0] = (weighted / jnp.where(total == 0, 1.0, total)).astype(out.dtype).reshape(group, size, width)
