"""Attention and the KV pool on a mesh: what a kernel does on one device, done on all of them.

KV heads are split over the mesh axis `kv`. Rows, and the pages that hold their tokens, are split over `data` and `rep`
together: each of these shards has its own pages, numbered from 0, and serves its own rows, so that no token is kept
twice. Where `rep` splits the query heads of the products, an all-to-all before attention and one after it change heads
for rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxllama.model import cache
from jaxllama.model.attention.interface import Attention
from jaxllama.model.cache import KVPool, kv_pool_axes
from jaxllama.model.mesh import RULES, num_page_shards, splitting

_SHARDS = RULES["pages"]
_KV = RULES["kv_heads"]
_HEADS = RULES["heads"]


@dataclass(frozen=True)
class ShardedAttention:
    """`kernel` on the devices of `mesh`; `mesh` None: on one device.

    Row r of R belongs to shard r // (R / num_shards), and its page table holds pages of that shard; R is a multiple of
    `num_shards`. Shapes are those of the whole mesh, and else arguments are as `Attention`'s and `cache`'s.
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
    ) -> tuple[Float[Array, "rows heads head_dim"], KVPool]:
        """As `Attention.decode`."""
        if self.mesh is None:
            return self.kernel.decode(q, kv, pool, page_table, positions, active)
        splits_heads = self._splits_heads(q, kv)

        # The exchange over `rep` is spelt out: XLA's own choice is five all-gathers a layer (bench/LOG.md).
        def attend(q: Array, kv: Array, pool: KVPool, *rest: Array) -> tuple[Array, KVPool]:
            q = jax.lax.all_to_all(q, "rep", 0, 1, tiled=True) if splits_heads else self._own_rows(q)
            out, pool = self.kernel.decode(q, self._own_rows(kv), pool, *map(self._own_rows, rest))
            if splits_heads:
                return jax.lax.all_to_all(out, "rep", 1, 0, tiled=True), pool
            return jax.lax.all_gather(out, "rep", tiled=True), pool

        rows, pool_spec = RULES["rows"], self._pool_spec(pool)
        q_spec = self._spec(rows, _HEADS if splits_heads else _KV)
        specs = (q_spec, self._spec(rows, _KV), pool_spec, *[self._spec(rows)] * 3)
        return self._on_devices(attend, specs, (q_spec, pool_spec))(q, kv, pool, page_table, positions, active)

    def prefill(
        self,
        q: Float[Array, "tokens heads head_dim"],
        kv: Float[Array, "tokens kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, " max_pages"],
        start: Int[Array, ""],
        num_tokens: Int[Array, ""],
        shard: Int[Array, ""],
    ) -> tuple[Float[Array, "tokens heads head_dim"], KVPool]:
        """As `Attention.prefill`, for a row of `shard`, which alone attends and tells the others."""
        splits_heads = self._splits_heads(q, kv)

        def attend(
            q: Array, kv: Array, pool: KVPool, table: Array, start: Array, num_tokens: Array, shard: Array
        ) -> tuple[Array, KVPool]:
            if self.num_shards == 1:
                return self.kernel.prefill(q, kv, pool, table, start, num_tokens)
            if splits_heads:
                q = jax.lax.all_gather(q, "rep", axis=1, tiled=True)
            is_own = _is_own(shard)
            # No tokens, and page 0, which no row is given.
            table, start, num_tokens = (jnp.where(is_own, x, 0) for x in (table, start, num_tokens))
            out, pool = self.kernel.prefill(q, kv, pool, table, start, num_tokens)
            out = jax.lax.psum(jnp.where(is_own, out, 0), "data")
            if splits_heads:
                return jax.lax.psum_scatter(out, "rep", scatter_dimension=1, tiled=True), pool
            return jax.lax.psum(out, "rep"), pool

        everywhere, pool_spec = self._spec(), self._pool_spec(pool)
        q_spec = self._spec((), _HEADS if splits_heads else _KV)
        specs = (q_spec, self._spec((), _KV), pool_spec, *[everywhere] * 4)
        on_devices = self._on_devices(attend, specs, (q_spec, pool_spec))
        return on_devices(q, kv, pool, page_table, start, num_tokens, shard)

    def clear_pages(
        self,
        pool: KVPool,
        pages: Int[Array, " max_pages"],
        count: Int[Array, ""],
        shard: Int[Array, ""],
        num_layers: int,
    ) -> KVPool:
        """As `cache.clear_pages`, for pages of `shard`."""

        def clear(pool: KVPool, pages: Array, count: Array, shard: Array) -> KVPool:
            return cache.clear_pages(pool, pages, jnp.where(self._owns(shard), count, 0), num_layers)

        spec, everywhere = self._pool_spec(pool), self._spec()
        return self._on_devices(clear, (spec, *[everywhere] * 3), spec)(pool, pages, count, shard)

    def read_pages(self, pool: KVPool, pages: Int[Array, " some"], shard: Int[Array, ""], num_layers: int) -> KVPool:
        """As `cache.read_pages`, of pages of `shard`. Every shard gets the copy."""

        def read(pool: KVPool, pages: Array, shard: Array) -> KVPool:
            copy = cache.read_pages(pool, pages, num_layers)
            return copy if self.num_shards == 1 else jax.tree.map(lambda part: _of_owner(part, shard), copy)

        spec, everywhere = self._pool_spec(pool), self._spec()
        copy_spec = self._pool_spec(pool, pages=())
        return self._on_devices(read, (spec, everywhere, everywhere), copy_spec)(pool, pages, shard)

    def put_pages(
        self, pool: KVPool, pages: Int[Array, " some"], copy: KVPool, shard: Int[Array, ""], num_layers: int
    ) -> KVPool:
        """As `cache.put_pages`, for pages of `shard`; `copy` may come of another one's."""

        def put(pool: KVPool, pages: Array, copy: KVPool, shard: Array) -> KVPool:
            return cache.put_pages(pool, jnp.where(self._owns(shard), pages, 0), copy, num_layers)

        spec, everywhere = self._pool_spec(pool), self._spec()
        specs = (spec, everywhere, self._pool_spec(pool, pages=()), everywhere)
        return self._on_devices(put, specs, spec)(pool, pages, copy, shard)

    def _splits_heads(self, q: Array, kv: Array) -> bool:
        """Whether `rep` splits the query heads: where each device has one KV head whose queries it divides."""
        if self.mesh is None:
            return False
        kv_heads, rep = kv.shape[1] // 2, self.mesh.shape["rep"]
        return rep > 1 and kv_heads == self.mesh.shape["kv"] and q.shape[1] // kv_heads % rep == 0

    def _own_rows(self, rows: Array) -> Array:
        """Of the rows that devices along `rep` have in common, those that this one attends for."""
        parts = rows.reshape(jax.lax.axis_size("rep"), -1, *rows.shape[1:])
        return parts[jax.lax.axis_index("rep")]

    def _owns(self, shard: Array) -> Array | bool:
        return self.num_shards == 1 or _is_own(shard)

    def _spec(self, *names: tuple[str, ...]) -> PartitionSpec:
        """Each dimension's mesh axes."""
        if self.mesh is None:
            return PartitionSpec()
        return PartitionSpec(*(splitting(axes, self.mesh) or None for axes in names))

    def _pool_spec(self, pool: KVPool, pages: tuple[str, ...] = _SHARDS) -> Any:
        """A `KVPool` of specs; `pages` are the mesh axes that split the pages."""
        return jax.tree.map(
            lambda axes: self._spec(pages, *(RULES[name] for name in axes[1:])),
            kv_pool_axes(pool.pages.dtype),
            is_leaf=lambda x: type(x) is tuple,
        )

    def _on_devices(self, run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        if self.mesh is None:
            return run
        return jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _is_own(shard: Array) -> Array:
    return jax.lax.axis_index(_SHARDS) == shard


def _of_owner(part: Array, shard: Array) -> Array:
    """What `shard` has, bit for bit: a sum of floats would make -0 a 0."""
    bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}"))
    bits = jax.lax.psum(jnp.where(_is_own(shard), bits, 0), _SHARDS)
    return jax.lax.bitcast_convert_type(bits, part.dtype)
