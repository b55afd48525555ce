"""Attention on a mesh: what a kernel does on one device, done on all of them.

KV heads are split over the mesh axis `kv`. Rows, and the pages that hold their tokens, are split over `data` and `rep`
together: each of these shards has its own pages, numbered from 0, and serves its own rows, so that no token is kept
twice. Where `rep` splits the query heads of the products, an all-to-all before attention and one after it change heads
for rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllama.model.attention.interface import Attention
from jaxllama.model.cache import KVPool, is_own, on_devices, pool_spec, spec_of
from jaxllama.model.mesh import RULES, num_page_shards

_KV = RULES["kv_heads"]
_HEADS = RULES["heads"]


@dataclass(frozen=True)
class ShardedAttention:
    """`kernel` on the devices of `mesh`; `mesh` None: on one device.

    Row r of R belongs to shard r // (R / num_shards), and its page table holds pages of that shard; R is a multiple of
    `num_shards`. Shapes are those of the whole mesh; otherwise arguments are `Attention`'s.
    """

    kernel: Attention
    mesh: Mesh | None = None

    @property
    def num_shards(self) -> int:
        """Into how many parts rows and pages are split."""
        return 1 if self.mesh is None else num_page_shards(self.mesh)

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
        if self.mesh is None:
            return self.kernel.decode(q, kv, pool, page_table, positions, active, window)
        splits_heads = self._splits_heads(q, kv)

        # The exchange over `rep` is spelt out: XLA's own choice is five all-gathers a layer (bench/LOG.md).
        def attend(
            q: Float[Array, "rows own_heads head_dim"],
            kv: Float[Array, "rows own_kv2 head_dim"],
            pool: KVPool,
            *rest: Array,
        ) -> tuple[Float[Array, "rows own_heads head_dim"], KVPool]:
            q = jax.lax.all_to_all(q, "rep", 0, 1, tiled=True) if splits_heads else self._own_rows(q)
            table, positions, active = map(self._own_rows, rest)
            out, pool = self.kernel.decode(q, self._own_rows(kv), pool, table, positions, active, window)
            if splits_heads:
                return jax.lax.all_to_all(out, "rep", 1, 0, tiled=True), pool
            return jax.lax.all_gather(out, "rep", tiled=True), pool

        rows, pages = RULES["rows"], pool_spec(pool, self.mesh)
        q_spec = spec_of(self.mesh, rows, _HEADS if splits_heads else _KV)
        specs = (q_spec, spec_of(self.mesh, rows, _KV), pages, *[spec_of(self.mesh, rows)] * 3)
        return on_devices(attend, self.mesh, specs, (q_spec, pages))(q, kv, pool, page_table, positions, active)

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
        if self.mesh is None:
            return self.kernel.verify(q, kv, pool, page_table, positions, num_tokens, window)
        splits_heads = self._splits_heads(q[:, 0], kv[:, 0])

        def attend(
            q: Float[Array, "rows tokens own_heads head_dim"],
            kv: Float[Array, "rows tokens own_kv2 head_dim"],
            pool: KVPool,
            *rest: Array,
        ) -> tuple[Float[Array, "rows tokens own_heads head_dim"], KVPool]:
            q = jax.lax.all_to_all(q, "rep", 0, 2, tiled=True) if splits_heads else self._own_rows(q)
            table, positions, num_tokens = map(self._own_rows, rest)
            out, pool = self.kernel.verify(q, self._own_rows(kv), pool, table, positions, num_tokens, window)
            if splits_heads:
                return jax.lax.all_to_all(out, "rep", 2, 0, tiled=True), pool
            return jax.lax.all_gather(out, "rep", tiled=True), pool

        rows, pages = RULES["rows"], pool_spec(pool, self.mesh)
        q_spec = spec_of(self.mesh, rows, (), _HEADS if splits_heads else _KV)
        specs = (q_spec, spec_of(self.mesh, rows, (), _KV), pages, *[spec_of(self.mesh, rows)] * 3)
        return on_devices(attend, self.mesh, specs, (q_spec, pages))(q, kv, pool, page_table, positions, num_tokens)

    def prefill(
        self,
        q: Float[Array, "rows tokens heads head_dim"],
        kv: Float[Array, "rows tokens kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        start: Int[Array, " rows"],
        num_tokens: Int[Array, " rows"],
        shard: Int[Array, " rows"],
        window: int | None = None,
    ) -> tuple[Float[Array, "rows tokens heads head_dim"], KVPool]:
        """As `Attention.prefill` for each row in turn, a row of `shard`, which alone attends and tells the others.

        Rows that `data` divides are split over it: those of a group are of shards of its own. Others are everywhere.
        """
        splits_heads = self._splits_heads(q[:, 0], kv[:, 0])
        splits_rows = self.splits_rows(len(q))

        def one(
            pool: KVPool, row: tuple[Shaped[Array, "*of_one"], ...]
        ) -> tuple[KVPool, Float[Array, "tokens own_heads head_dim"]]:
            q, kv, table, start, num_tokens, shard = row
            if self.num_shards == 1:
                out, pool = self.kernel.prefill(q, kv, pool, table, start, num_tokens, window)
                return pool, out
            owns = is_own(shard)
            # No tokens, and page 0, which no row is given.
            table, start, num_tokens = (jnp.where(owns, x, 0) for x in (table, start, num_tokens))
            out, pool = self.kernel.prefill(q, kv, pool, table, start, num_tokens, window)
            return pool, jnp.where(owns, out, 0)

        def attend(
            q: Float[Array, "own tokens own_heads head_dim"],
            kv: Float[Array, "own tokens own_kv2 head_dim"],
            pool: KVPool,
            *at: Array,
        ) -> tuple[Float[Array, "own tokens own_heads head_dim"], KVPool]:
            if splits_heads:
                q = jax.lax.all_gather(q, "rep", axis=2, tiled=True)
            if len(q) == 1:
                pool, out = one(pool, jax.tree.map(lambda x: x[0], (q, kv, *at)))
                out = out[None]
            else:
                # A loop, so that a row's bits do not depend on its place: all run the same instructions.
                pool, out = jax.lax.scan(one, pool, (q, kv, *at))
            if self.num_shards == 1:
                return out, pool
            if not splits_rows:
                out = jax.lax.psum(out, "data")
            if splits_heads:
                return jax.lax.psum_scatter(out, "rep", scatter_dimension=2, tiled=True), pool
            return jax.lax.psum(out, "rep"), pool

        if self.mesh is None:
            return attend(q, kv, pool, page_table, start, num_tokens, shard)
        rows, pages = RULES["rows"] if splits_rows else (), pool_spec(pool, self.mesh)
        q_spec = spec_of(self.mesh, rows, (), _HEADS if splits_heads else _KV)
        specs = (q_spec, spec_of(self.mesh, rows, (), _KV), pages, *[spec_of(self.mesh, rows)] * 4)
        return on_devices(attend, self.mesh, specs, (q_spec, pages))(q, kv, pool, page_table, start, num_tokens, shard)

    def split_rows(self, rows: Shaped[Array, "rows ..."]) -> Shaped[Array, "rows ..."]:
        """`rows` where `prefill` wants them, and with them what is computed of them."""
        if self.mesh is None or self.mesh.shape["data"] == 1 or not self.splits_rows(len(rows)):
            return rows
        split: Array = jax.lax.with_sharding_constraint(
            rows, NamedSharding(self.mesh, spec_of(self.mesh, RULES["rows"]))
        )
        return split

    def splits_rows(self, num_rows: int) -> bool:
        """Whether `prefill` splits so many rows over `data`."""
        return self.mesh is not None and num_rows % self.mesh.shape["data"] == 0

    def _splits_heads(self, q: Float[Array, "rows heads head_dim"], kv: Float[Array, "rows kv2 head_dim"]) -> bool:
        """Whether `rep` splits the query heads: where each device has one KV head whose queries it divides."""
        if self.mesh is None:
            return False
        kv_heads, rep = kv.shape[1] // 2, self.mesh.shape["rep"]
        return rep > 1 and kv_heads == self.mesh.shape["kv"] and q.shape[1] // kv_heads % rep == 0

    def _own_rows(self, rows: Shaped[Array, "rows ..."]) -> Shaped[Array, "own ..."]:
        """Of the rows that devices along `rep` have in common, those that this one attends for."""
        parts = rows.reshape(jax.lax.axis_size("rep"), -1, *rows.shape[1:])
        return parts[jax.lax.axis_index("rep")]
