"""Paged attention on GPUs: one Pallas kernel through Triton, for steps and chunks, over pages of bfloat16 or int8.

A program takes a block of one row's queries, with all query heads of one KV head, over the row's pages. With one query
a row there are too few of them to keep a GPU busy, so the keys of a long row are split among programs, whose sums are
put together afterwards. How is told by the row's own length: other rows do not change its bits.

Source: Dao et al. 2023, arXiv:2307.08691 (blocks), and the "flash decoding" of the same authors (split keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxllama.errors import ConfigError
from jaxllama.model.attention.reference import KernelAttention
from jaxllama.model.cache import KVPool

HEAD_DIMS = (64, 128)
_BLOCK_KEYS = 64
_BLOCK_QUERIES = 64
_LEAST_QUERIES = 16  # of a Triton product
_SPLIT_KEYS = 512
_MAX_SPLITS = 16
_MASKED = -1e30
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class GpuAttention(KernelAttention):
    """`Attention` for one GPU, for heads of `HEAD_DIMS` and no windows. Tokens are written as the reference does.

    `interpret` runs the kernel in Pallas's interpreter, on any backend.
    """

    interpret: bool = False

    def validate(self, *, page_size: int, num_rows: int, table_width: int) -> None:
        """As `Attention.validate`: a block of keys is whole pages."""
        if _BLOCK_KEYS % page_size:
            raise ConfigError(f"page_size must divide {_BLOCK_KEYS} for this kernel, got {page_size}")

    def _attend(
        self,
        q: Float[Array, "rows tokens heads head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, "rows tokens"],
        window: int | None,
    ) -> Float[Array, "rows tokens heads head_dim"]:
        assert window is None, "windows have no kernel here"
        return attend(q, pool, page_table, positions, interpret=self.interpret)


def attend(
    q: Float[Array, "rows tokens heads head_dim"],
    pool: KVPool,
    page_table: Int[Array, "rows max_pages"],
    positions: Int[Array, "rows tokens"],
    *,
    interpret: bool,
) -> Float[Array, "rows tokens heads head_dim"]:
    """Each query attends to its row's keys at positions up to its own.

    A row's positions follow one another, up to its last real one, which those after it repeat. `page_table` holds pages
    of the layer that is read (already offset).
    """
    rows, tokens, heads, head_dim = q.shape
    kv_heads = pool.pages.shape[1 if pool.heads_first else 2] // 2
    group = heads // kv_heads
    pages_per_block = _BLOCK_KEYS // pool.page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_block)))
    capacity = page_table.shape[1] * pool.page_size
    block = min(_BLOCK_QUERIES, max(_LEAST_QUERIES, 1 << (tokens * group - 1).bit_length()))
    num_blocks = -(-tokens * group // block)
    num_splits = 1 if tokens > 1 else max(1, min(_MAX_SPLITS, capacity // _SPLIT_KEYS))
    # [rows, K, queries, D], the query heads of a KV head one after another for each token.
    grouped = q.reshape(rows, tokens, kv_heads, group, head_dim).swapaxes(1, 2).reshape(rows, kv_heads, -1, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, num_blocks * block - tokens * group), (0, 0)))
    bounds = jnp.stack((positions[:, 0], positions[:, -1]), axis=1)
    sums = _partial_sums(
        grouped,
        pool,
        page_table,
        bounds,
        sizes=_Sizes(group, block, num_blocks, num_splits, pages_per_block),
        interpret=interpret,
    )
    largest = sums.largest.max(axis=0)
    share = jnp.exp2(sums.largest - largest)
    total = (sums.total * share).sum(axis=0)
    out = (sums.weighted * share[..., None]).sum(axis=0) / total[..., None]
    out = out[:, :, : tokens * group].reshape(rows, kv_heads, tokens, group, head_dim)
    return out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


class _Sizes(NamedTuple):
    group: int
    block: int
    num_blocks: int
    num_splits: int
    pages_per_block: int


class _Sums(NamedTuple):
    """Of each split, in float32: the largest score (base 2), and sums of probabilities relative to it and of values."""

    largest: Float[Array, "splits rows kv queries"]
    total: Float[Array, "splits rows kv queries"]
    weighted: Float[Array, "splits rows kv queries head_dim"]


def _partial_sums(
    q: Float[Array, "rows kv queries head_dim"],
    pool: KVPool,
    page_table: Int[Array, "rows max_pages"],
    bounds: Int[Array, "rows two"],
    *,
    sizes: _Sizes,
    interpret: bool,
) -> _Sums:
    rows, kv_heads, queries, head_dim = q.shape
    num_pages, page_size = pool.pages.shape[0], pool.page_size
    grid = (rows * sizes.num_blocks, kv_heads, sizes.num_splits)

    def of_head(kind: int) -> list[pl.BlockSpec]:
        """Keys or values of the program's head, and their scales."""
        if pool.scales is None:
            shape: tuple[int | None, ...] = (num_pages, page_size, None, head_dim)
            return [pl.BlockSpec(shape, lambda part, head, split: (0, 0, 2 * head + kind, 0))]
        shape = (num_pages, None, page_size, head_dim)
        return [
            pl.BlockSpec(shape, lambda part, head, split: (0, 2 * head + kind, 0, 0)),
            pl.BlockSpec(shape[:3], lambda part, head, split: (0, 2 * head + kind, 0)),
        ]

    def where(part: Any, head: Any, split: Any) -> tuple[Any, ...]:
        return split, part // sizes.num_blocks, head, part % sizes.num_blocks

    of_row = pl.BlockSpec((None, page_table.shape[1]), lambda part, head, split: (part // sizes.num_blocks, 0))
    of_sum = pl.BlockSpec((None, None, None, sizes.block), where)
    shape = (sizes.num_splits, rows, kv_heads, queries)
    outs = pl.pallas_call(
        partial(_kernel, scale=head_dim**-0.5 * _LOG2_E, sizes=sizes, is_int8=pool.scales is not None),
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, None, sizes.block, head_dim), lambda *at: (*where(*at)[1:], 0)),
            of_row,
            pl.BlockSpec((None, 2), lambda part, head, split: (part // sizes.num_blocks, 0)),
            *of_head(0),
            *of_head(1),
        ],
        out_specs=[
            of_sum,
            of_sum,
            pl.BlockSpec((None, None, None, sizes.block, head_dim), lambda *at: (*where(*at), 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(q, page_table, bounds, *[part for _ in range(2) for part in jax.tree.leaves(pool)])
    return _Sums(*outs)


def _kernel(q_ref: Any, table: Any, bounds: Any, *refs: Any, scale: float, sizes: _Sizes, is_int8: bool) -> None:
    *pool, largest_ref, total_ref, weighted_ref = refs
    (keys, values), scales = (pool[0::2], pool[1::2]) if is_int8 else (pool, None)
    page_size, head_dim = keys.shape[1:]
    block_keys = sizes.pages_per_block * page_size
    part, split = pl.program_id(0), pl.program_id(2)
    q = q_ref[...]
    query = (part % sizes.num_blocks) * sizes.block + jnp.arange(sizes.block)
    last = bounds[1]
    limit = jnp.minimum(bounds[0] + query // sizes.group, last)
    # The last query of this block sees the most.
    most = jnp.minimum(bounds[0] + ((part % sizes.num_blocks + 1) * sizes.block - 1) // sizes.group, last)
    num_blocks = most // block_keys + 1
    own = (num_blocks + sizes.num_splits - 1) // sizes.num_splits
    start, end = split * own, jnp.minimum((split + 1) * own, num_blocks)

    def read(ref: Any, pages: Any) -> Any:
        return ref[pages].reshape(block_keys, *ref.shape[2:])

    def visit(index: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        largest, total, weighted = carry
        pages = table[pl.ds(index * sizes.pages_per_block, sizes.pages_per_block)]
        key = index * block_keys + jnp.arange(block_keys)
        k, v = (read(ref, pages).astype(q.dtype) for ref in (keys, values))
        scores = plgpu.dot(q, k.T) * scale
        if scales is not None:
            scores *= read(scales[0], pages)[None, :]
        visible = key[None, :] <= limit[:, None]
        scores = jnp.where(visible, scores, _MASKED)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        probs = jnp.where(visible, jnp.exp2(scores - new_largest[:, None]), 0.0)
        decay = jnp.exp2(largest - new_largest)
        total = total * decay + probs.sum(axis=1)
        # Pages may hold a failed row's NaN past this row's end, and 0 × NaN is NaN.
        is_own = key <= last
        if scales is not None:
            probs *= jnp.where(is_own, read(scales[1], pages), 0.0)[None, :]
        else:
            v = jnp.where(is_own[:, None], v, jnp.zeros_like(v))
        weighted = weighted * decay[:, None] + plgpu.dot(probs.astype(q.dtype), v)
        return new_largest, total, weighted

    nothing = (
        jnp.full((sizes.block,), _MASKED, jnp.float32),
        jnp.zeros((sizes.block,), jnp.float32),
        jnp.zeros((sizes.block, head_dim), jnp.float32),
    )
    largest, total, weighted = jax.lax.fori_loop(start, end, visit, nothing)
    largest_ref[...], total_ref[...], weighted_ref[...] = largest, total, weighted
