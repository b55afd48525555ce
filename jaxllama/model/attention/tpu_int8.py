"""Paged attention over an int8 cache on TPUs, by Pallas kernels of our own: decode here, prefill in `tpu_int8_prefill`.

The kernel reads a row's pages as int8, four at a time through a ring of buffers that runs ahead over row borders, and
writes the new token into the row's last page while it is there: one call a layer, and no copy of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from jaxllama.model.attention.tpu import TpuAttention
from jaxllama.model.attention.tpu_int8_prefill import attend_chunk
from jaxllama.model.cache import KVPool, stored, write_pages

BLOCK_PAGES = 4
"""Pages that are computed together."""
_RING_BYTES = 2 * 2**20
"""In flight at once: HBM bandwidth times its latency, and some."""
_MASKED = -1e30


@dataclass(frozen=True)
class Int8TpuAttention(TpuAttention):
    """As `TpuAttention`, for int8 pools. Pages need not be cleared: what lies past a row's end is never used."""

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
        """As `Attention.decode`. Rows that are not active write to page 0, which no row is given."""
        page_table, positions = self.without_inactive(page_table, positions, active, pool)
        return self._decode(q, kv, pool, page_table, positions, window)

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
        """As `Attention.verify`, one token after another: the kernel reads a row's pages once for each."""
        outs = []
        for token in range(q.shape[1]):
            active = token < num_tokens
            out, pool = self.decode(q[:, token], kv[:, token], pool, page_table, positions + token, active, window)
            outs.append(out)
        return jnp.stack(outs, axis=1), pool

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
        pool = write_pages(pool, kv, page_table, start, num_tokens, self.layout)
        (heads, head_dim), kv_heads, per_row = q.shape[1:], kv.shape[1] // 2, 1
        if self.layout is not None:
            q, per_row = self.layout.pack_queries(q, kv_heads), self.layout.per_row
        out = attend_chunk(
            q,
            pool,
            page_table,
            start,
            num_tokens,
            scale=head_dim**-0.5,
            per_row=per_row,
            window=window,
            interpret=self.interpret,
        )
        return out if self.layout is None else self.layout.unpack(out, heads, kv_heads, head_dim), pool

    def _decode(
        self,
        q: Float[Array, "rows heads head_dim"],
        kv: Float[Array, "rows kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        window: int | None,
    ) -> tuple[Float[Array, "rows heads head_dim"], KVPool]:
        (heads, head_dim), kv_heads = q.shape[1:], kv.shape[1] // 2
        new, per_row = stored(kv, pool, self.layout), 1
        if self.layout is not None:
            q, per_row = self.layout.pack_queries(q, kv_heads), self.layout.per_row
        how: dict[str, Any] = {"scale": head_dim**-0.5, "per_row": per_row, "window": window}
        out, pool = _decode(q, new, pool, page_table, positions, **how, interpret=self.interpret)
        return out if self.layout is None else self.layout.unpack(out, heads, kv_heads, head_dim), pool


def _decode(
    q: Float[Array, "rows heads head_dim"],
    new: KVPool,
    pool: KVPool,
    page_table: Int[Array, "rows max_pages"],
    positions: Int[Array, " rows"],
    *,
    scale: float,
    per_row: int,
    window: int | None,
    interpret: bool,
) -> tuple[Float[Array, "rows heads head_dim"], KVPool]:
    """`new` is each row's token: values [rows, 2K, D], scales [rows, 2K × per_row].

    A KV head may stand for `per_row` of them side by side, of which each has as many of its query heads. Scores are
    multiplied by `scale`.
    """
    assert pool.scales is not None
    assert new.scales is not None
    rows, heads, head_dim = q.shape
    kv2, page_size = pool.pages.shape[1:3]
    group = heads // (kv2 // 2)
    block_bytes = BLOCK_PAGES * kv2 * page_size * head_dim
    ring = max(2, min(8, _RING_BYTES // block_bytes))
    row_block = partial(pl.BlockSpec, memory_space=pltpu.VMEM)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    out, pages, scales = pl.pallas_call(
        partial(
            _decode_kernel, table_width=page_table.shape[1], ring=ring, scale=scale, per_row=per_row, window=window
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows,),
            in_specs=[
                row_block((1, kv2 // 2, group, head_dim), lambda row, *_: (row, 0, 0, 0)),
                row_block((1, 1, kv2 * head_dim), lambda row, *_: (row, 0, 0)),
                in_hbm,
                in_hbm,
            ],
            out_specs=[
                row_block((1, kv2 // 2, group, head_dim), lambda row, *_: (row, 0, 0, 0)),
                in_hbm,
                in_hbm,
            ],
            scratch_shapes=[
                pltpu.VMEM((ring, BLOCK_PAGES, kv2, page_size, head_dim), jnp.int8),
                pltpu.VMEM((ring, BLOCK_PAGES, kv2 * per_row, page_size), jnp.float32),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.SemaphoreType.DMA((ring, 2)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, kv2 // 2, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(pool.pages.shape, pool.pages.dtype),
            jax.ShapeDtypeStruct(pool.scales.shape, pool.scales.dtype),
        ],
        # Counted with the three prefetched arguments.
        input_output_aliases={5: 1, 6: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=16 * 2**20, has_side_effects=True
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="int8_paged_decode",
    )(
        page_table.reshape(-1),
        positions,
        new.scales.reshape(-1),
        q.reshape(rows, kv2 // 2, group, head_dim),
        # One after another: in tiles of two, as keys and values alternate, XLA would copy what they are made of.
        new.pages.astype(jnp.int32).reshape(rows, 1, kv2 * head_dim),
        pool.pages,
        pool.scales,
    )
    return out.reshape(q.shape).astype(q.dtype), KVPool(pages, scales)


class _Ring:
    """Buffers that blocks of pages are copied into, in the order rows and blocks are visited.

    `cursor` is (steps done, row, block) of the next block to ask for. Pages past a row's end are not copied, nor blocks
    before its window.
    """

    def __init__(
        self,
        table: Any,
        positions: Any,
        width: int,
        window: int | None,
        hbm: tuple[Any, Any],
        buffers: tuple[Any, Any],
        sems: Any,
    ) -> None:
        self.table, self.positions, self.width, self.window = table, positions, width, window
        self.hbm, self.buffers, self.sems = hbm, buffers, sems
        self.page_size = hbm[0].shape[2]
        self.size = buffers[0].shape[0]

    def num_blocks(self, row: Any) -> Any:
        return self.positions[row] // (BLOCK_PAGES * self.page_size) + 1

    def first_block(self, row: Any) -> Any:
        if self.window is None:
            return 0
        return jnp.maximum(self.positions[row] - self.window + 1, 0) // (BLOCK_PAGES * self.page_size)

    def start(self, row: Any, block: Any, slot: Any) -> None:
        for copies, is_needed in self._copies(row, block, slot):

            @pl.when(is_needed)
            def _(copies: Any = copies) -> None:
                for copy in copies():
                    copy.start()

    def wait(self, row: Any, block: Any, slot: Any) -> None:
        for copies, is_needed in self._copies(row, block, slot):

            @pl.when(is_needed)
            def _(copies: Any = copies) -> None:
                for copy in copies():
                    copy.wait()

    def _copies(self, row: Any, block: Any, slot: Any) -> Iterator[tuple[Any, Any]]:
        for i in range(BLOCK_PAGES):
            index = block * BLOCK_PAGES + i

            def copies(i: int = i, index: Any = index) -> Iterator[Any]:
                page = self.table[row * self.width + index]
                for kind in range(2):
                    yield pltpu.make_async_copy(
                        self.hbm[kind].at[page], self.buffers[kind].at[slot, i], self.sems.at[slot, kind]
                    )

            yield copies, index * self.page_size <= self.positions[row]


def _decode_kernel(
    table: Any,
    positions: Any,
    new_scales: Any,
    q: Any,
    new: Any,
    _pages_in: Any,
    _scales_in: Any,
    out: Any,
    pages: Any,
    scales: Any,
    page_buffers: Any,
    scale_buffers: Any,
    cursor: Any,
    read_sems: Any,
    write_sems: Any,
    *,
    table_width: int,
    ring: int,
    scale: float,
    per_row: int,
    window: int | None,
) -> None:
    row, num_rows = pl.program_id(0), pl.num_programs(0)
    _, kv_heads, group, head_dim = q.shape
    page_size = pages.shape[2]
    position = positions[row]
    buffers = _Ring(table, positions, table_width, window, (pages, scales), (page_buffers, scale_buffers), read_sems)

    def fetch(slot: Any) -> None:
        """Asks for the block at the cursor and moves it on."""
        at_row, at_block = cursor[1], cursor[2]

        @pl.when(at_row < num_rows)
        def _() -> None:
            buffers.start(at_row, at_block, slot)
            is_last = at_block + 1 >= buffers.num_blocks(at_row)
            next_row = jnp.where(is_last, at_row + 1, at_row)
            cursor[1] = next_row
            cursor[2] = jnp.where(is_last, buffers.first_block(jnp.minimum(next_row, num_rows - 1)), at_block + 1)

    @pl.when(row == 0)
    def fill() -> None:
        cursor[0] = 0
        cursor[1] = 0
        cursor[2] = buffers.first_block(0)
        for slot in range(ring - 1):
            fetch(slot)

    last_block = buffers.num_blocks(row) - 1
    last_page = position // page_size - last_block * BLOCK_PAGES
    offset = position % page_size

    def merge(slot: Any) -> None:
        """Puts the new token into the row's last page and begins to write that back."""
        is_new = jax.lax.broadcasted_iota(jnp.int32, (page_size, head_dim), 0) == offset
        is_new_scale = jax.lax.broadcasted_iota(jnp.int32, (1, page_size), 1) == offset
        for head in range(2 * kv_heads):
            old = page_buffers[slot, last_page, head].astype(jnp.int32)
            token = new[0, :, head * head_dim : (head + 1) * head_dim]
            page_buffers[slot, last_page, head] = jnp.where(is_new, token, old).astype(jnp.int8)
        num_scales = 2 * kv_heads * per_row
        for index in range(num_scales):
            own = pl.ds(index, 1)
            old_scale = scale_buffers[slot, last_page, own]
            scale_buffers[slot, last_page, own] = jnp.where(
                is_new_scale, new_scales[row * num_scales + index], old_scale
            )
        for copy in writes(slot):
            copy.start()

    def writes(slot: Any) -> Iterator[Any]:
        page = table[row * table_width + position // page_size]
        yield pltpu.make_async_copy(page_buffers.at[slot, last_page], pages.at[page], write_sems.at[0])
        yield pltpu.make_async_copy(scale_buffers.at[slot, last_page], scales.at[page], write_sems.at[1])

    def visit(block: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step = cursor[0]
        slot = jax.lax.rem(step, ring)
        cursor[0] = step + 1
        fetch(jax.lax.rem(step + ring - 1, ring))
        buffers.wait(row, block, slot)

        @pl.when(block == last_block)
        def write() -> None:
            merge(slot)

        first = block * BLOCK_PAGES * page_size
        tokens = first + jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK_PAGES * page_size), 1)
        visible = tokens <= position
        if window is not None:
            visible &= tokens > position - window
        carry = tuple(
            _attend_head(
                q[0, head], page_buffers, scale_buffers, slot, head, visible, carry[head], scale=scale, per_row=per_row
            )
            for head in range(kv_heads)
        )

        @pl.when(block == last_block)
        def wait_for_the_write() -> None:
            for copy in writes(slot):
                copy.wait()

        return carry

    nothing = (
        jnp.full((group, 1), _MASKED, jnp.float32),
        jnp.zeros((group, 1), jnp.float32),
        jnp.zeros((group, head_dim), jnp.float32),
    )
    carry = jax.lax.fori_loop(buffers.first_block(row), last_block + 1, visit, (nothing,) * kv_heads)
    for head, (_, total, weighted) in enumerate(carry):
        out[0, head] = weighted / total


def _attend_head(
    q: Any,
    page_buffers: Any,
    scale_buffers: Any,
    slot: Any,
    head: int,
    visible: Any,
    carry: tuple[Any, Any, Any],
    *,
    scale: float,
    per_row: int,
) -> tuple[Any, Any, Any]:
    """One KV head's query heads over a block of pages, with an online softmax."""
    largest, total, weighted = carry
    page_size = page_buffers.shape[3]
    of_query = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], page_size), 0) // (q.shape[0] // per_row)

    def page(index: int, kind: int) -> tuple[Any, Any]:
        at = 2 * head + kind
        values = page_buffers[slot, index, at].astype(jnp.float32).astype(q.dtype)
        scales = scale_buffers[slot, index, pl.ds(at * per_row, 1)]
        for other in range(1, per_row):
            scales = jnp.where(of_query == other, scale_buffers[slot, index, pl.ds(at * per_row + other, 1)], scales)
        return values, scales

    scores = []
    for index in range(BLOCK_PAGES):
        keys, scales = page(index, 0)
        product = jax.lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores.append(product * (scales * scale))
    # Where nothing is visible, buffers hold whatever was there, a scale of NaN perhaps.
    masked = jnp.where(visible, jnp.concatenate(scores, axis=1), _MASKED)
    new_largest = jnp.maximum(largest, masked.max(axis=1, keepdims=True))
    probs = jnp.exp(masked - new_largest)
    decay = jnp.exp(largest - new_largest)
    weighted = weighted * decay
    for index in range(BLOCK_PAGES):
        values, scales = page(index, 1)
        own = slice(index * page_size, (index + 1) * page_size)
        shares = jnp.where(visible[:, own], probs[:, own] * scales, 0.0).astype(q.dtype)
        weighted += jax.lax.dot_general(shares, values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return new_largest, total * decay + probs.sum(axis=1, keepdims=True), weighted
