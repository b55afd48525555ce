"""Paged attention by flywheel-tpu's Pallas kernels: one call a layer writes the new keys and values and attends.

The kernels take bfloat16, heads of a multiple of 128 and pages of a multiple of 128 tokens, and read the pool in the
layout that all implementations share. bench/LOG.md has the TPU compiler's figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxllama.cache import KVPool, kv_pool_axes
from jaxllama.config import LlamaConfig
from jaxllama.errors import ConfigError, MissingExtraError
from jaxllama.mesh import partition_spec

_MAX_TABLE_BYTES = 2**20
_DECODE_VMEM_BYTES = 16 * 2**20


@dataclass(frozen=True)
class TpuAttention:
    """Every device attends with its own query heads to its own KV heads; nothing is exchanged.

    `interpret` runs the kernels in Pallas's interpreter, on any backend.
    """

    config: LlamaConfig
    mesh: Mesh
    interpret: bool = False

    page_size = 128
    chunk_sizes = (128, 512, 2048)
    needs_clean_pages = True
    keeps_float32 = False
    layers_per_loop = 20

    def validate(self, *, page_size: int, num_rows: int, table_width: int) -> None:
        """As `Attention.validate`: the kernels read the page table from the scalar memory."""
        if page_size % 128:
            raise ConfigError(f"page_size must be a multiple of 128 on a TPU, got {page_size}")
        if num_rows * table_width * 4 >= _MAX_TABLE_BYTES:
            raise ConfigError(
                f"a page table of {num_rows} rows × {table_width} pages is larger than a TPU core's scalar memory "
                f"({_MAX_TABLE_BYTES} bytes). Lower max_rows or max_context, or raise page_size"
            )

    def decode(
        self,
        q: Float[Array, "rows heads head_dim"],
        kv: Float[Array, "rows kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        active: Bool[Array, " rows"],
    ) -> tuple[Float[Array, "rows heads head_dim"], KVPool]:
        """As `Attention.decode`. Rows that are not active write to page 0, which no row is given."""
        page_table, positions = self.without_inactive(page_table, positions, active, pool)
        kv = jnp.where(active[:, None, None], kv, 0)

        def attend(q: Array, kv: Array, pool: KVPool, page_table: Array, positions: Array) -> tuple[Array, KVPool]:
            k, v = kv[:, 0::2], kv[:, 1::2]
            out, pages = _kernel()(
                q[:, None],
                pool.pages,
                None,
                k[:, None],
                v[:, None],
                cache_seqlens=positions,
                block_table=page_table,
                causal=True,
                interpret=self.interpret,
            )
            return out[:, 0], pool._replace(pages=pages)

        return self.on_each_device(attend, q, kv, pool, page_table, positions)

    def without_inactive(
        self, page_table: Array, positions: Array, active: Array, pool: KVPool
    ) -> tuple[Int[Array, "rows max_pages"], Int[Array, " rows"]]:
        """Page table and positions with those rows at position 0 of page 0 that are not active."""
        num_pages = pool.pages.shape[0] // self.config.num_layers
        return jnp.where(active[:, None], page_table, page_table - page_table % num_pages), jnp.where(
            active, positions, 0
        )

    def prefill(
        self,
        q: Float[Array, "tokens heads head_dim"],
        kv: Float[Array, "tokens kv2 head_dim"],
        pool: KVPool,
        page_table: Int[Array, " max_pages"],
        start: Int[Array, ""],
        num_tokens: Int[Array, ""],
    ) -> tuple[Float[Array, "tokens heads head_dim"], KVPool]:
        """As `Attention.prefill`. Zeros for the padding."""

        def attend(
            q: Array, kv: Array, pool: KVPool, table: Array, start: Array, num_tokens: Array
        ) -> tuple[Array, KVPool]:
            out, pages = self.prefill_shard(q, kv, pool.pages, table, start, num_tokens)
            return out, pool._replace(pages=pages)

        return self.on_each_device(attend, q, kv, pool, page_table, start, num_tokens)

    def prefill_shard(
        self, q: Array, kv: Array, pages: Array, table: Array, start: Array, num_tokens: Array
    ) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "pages page_size kv2 head_dim"]]:
        """One device's share of `prefill`."""
        out, pages = _kernel()(
            q,
            pages,
            None,
            kv[:, 0::2],
            kv[:, 1::2],
            cache_seqlens=start[None],
            block_table=table[None],
            cu_seqlens_q=jnp.stack((jnp.zeros_like(num_tokens), num_tokens)),
            causal=True,
            interpret=self.interpret,
        )
        return out, pages

    def on_each_device(
        self, attend: Callable[..., tuple[Array, KVPool]], q: Array, kv: Any, pool: KVPool, *rest: Array
    ) -> tuple[Array, KVPool]:
        """Runs `attend(q, kv, pool, *rest)` under `shard_map`: heads are split, `rest` is not.

        `kv` is [n, 2K, D], or that and its scales [n, 2K].
        """
        pool_specs = jax.tree.map(
            lambda axes: partition_spec(axes, self.config, self.mesh),
            kv_pool_axes(pool.pages.dtype),
            is_leaf=lambda x: type(x) is tuple,
        )
        heads = partition_spec(("kv_heads",), self.config, self.mesh)
        q_spec, kv_spec = PartitionSpec(None, self._query_axes(), None), PartitionSpec(None, *heads)
        return jax.shard_map(
            attend,
            mesh=self.mesh,
            in_specs=(q_spec, jax.tree.map(lambda _: kv_spec, kv), pool_specs, *(PartitionSpec() for _ in rest)),
            out_specs=(q_spec, pool_specs),
            check_vma=False,
        )(q, kv, pool, *rest)

    def _query_axes(self) -> tuple[str, ...]:
        """Query heads go where their KV head is, and over `rep` too where each device has one KV head."""
        kv, rep = self.mesh.shape["kv"], self.mesh.shape["rep"]
        splits = self.config.num_kv_heads == kv and self.config.q_per_kv % rep == 0
        return ("kv", "rep") if splits else ("kv",)


def _kernel() -> Callable[..., tuple[Array, Array]]:
    try:
        from flywheel_tpu import flash_attn_with_kvcache
        from flywheel_tpu.pallas import flash_fwd_kvcache
    except ModuleNotFoundError as error:
        raise MissingExtraError("tpu", error.name or "flywheel_tpu") from error
    # It asks for 100 MiB of VMEM and uses one, and XLA cannot prefetch weights into what it asks for: 1 ms in 17 for
    # the 70B on v6e-8 (bench/LOG.md).
    flash_fwd_kvcache.vmem_limit_bytes = lambda: _DECODE_VMEM_BYTES
    kernel: Callable[..., tuple[Array, Array]] = flash_attn_with_kvcache
    return kernel
