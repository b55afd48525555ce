"""Paged attention by the kernels of `jaxllama.native`."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllama import native
from jaxllama.attention.reference import ReferenceAttention, chunk_positions
from jaxllama.cache import KVPool, write_pages, write_tokens


@dataclass(frozen=True)
class CpuAttention(ReferenceAttention):
    """`Attention` for one CPU: bfloat16 queries, a cache of bfloat16 and heads of a multiple of 64."""

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
        positions = jnp.where(active, positions, 0)
        return native.attend(q[:, None], pool.pages, page_table, positions[:, None])[:, 0], pool

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
        return native.attend(q[None], pool.pages, page_table[None], positions[None])[0], pool
