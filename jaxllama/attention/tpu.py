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
        num_pages = pool.pages.shape[0] // self.config.num_layers
        positions = jnp.where(active, positions, 0)
        kv = jnp.where(active[:, None, None], kv, 0)
        page_table = jnp.where(active[:, None], page_table, page_table - page_table % num_pages)

        def attend(q: Array, kv: Array, pages: Array, page_table: Array, positions: Array) -> tuple[Array, Array]:
            k, v = kv[:, 0::2], kv[:, 1::2]
            out, pages = _kernel()(
                q[:, None],
                pages,
                None,
                k[:, None],
                v[:, None],
                cache_seqlens=positions,
                block_table=page_table,
                causal=True,
                interpret=self.interpret,
            )
            return out[:, 0], pages

        return self._on_each_device(attend, q, kv, pool, page_table, positions)

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
        ends = jnp.stack((jnp.zeros_like(num_tokens), num_tokens))

        def attend(q: Array, kv: Array, pages: Array, table: Array, start: Array, ends: Array) -> tuple[Array, Array]:
            out, pages = _kernel()(
                q,
                pages,
                None,
                kv[:, 0::2],
                kv[:, 1::2],
                cache_seqlens=start[None],
                block_table=table[None],
                cu_seqlens_q=ends,
                causal=True,
                interpret=self.interpret,
            )
            return out, pages

        return self._on_each_device(attend, q, kv, pool, page_table, start, ends)

    def _on_each_device(
        self, attend: Callable[..., tuple[Array, Array]], q: Array, kv: Array, pool: KVPool, *rest: Array
    ) -> tuple[Array, KVPool]:
        axes: Any = kv_pool_axes(pool.pages.dtype).pages
        pages = partition_spec(axes, self.config, self.mesh)
        q_spec, kv_spec = PartitionSpec(None, self._query_axes(), None), PartitionSpec(None, pages[2], None)
        shards = jax.shard_map(
            attend,
            mesh=self.mesh,
            in_specs=(q_spec, kv_spec, pages, *(PartitionSpec() for _ in rest)),
            out_specs=(q_spec, pages),
            check_vma=False,
        )
        out, new_pages = shards(q, kv, pool.pages, *rest)
        return out, pool._replace(pages=new_pages)

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
