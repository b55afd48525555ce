"""Paged attention by flywheel-tpu's Pallas kernels. A step's call a layer writes the new keys and values and attends.

The kernels take bfloat16, heads of 128 or 256 and pages of a multiple of 128 tokens. Narrower heads lie side by side in
the pool (`HeadLayout`), which the kernels take for fewer and wider ones. bench/LOG.md has the TPU compiler's figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxllama.errors import ConfigError, MissingExtraError
from jaxllama.model.cache import HeadLayout, KVPool, interleave_kv

_MAX_TABLE_BYTES = 2**20
_DECODE_VMEM_BYTES = 16 * 2**20


@dataclass(frozen=True)
class TpuAttention:
    """`Attention` by those kernels. `interpret` runs them in Pallas's interpreter, on any backend.

    `layout` is the pool's; None: each head by itself. `keeps_pairs`: XLA is to see that a step's keys and values, which
    are taken apart for flywheel, are put together there again: two copies a layer less. For rows that are a slice of
    others; else the tiles of pairs go back to rotation, where they cost three (bench/LOG.md).
    """

    num_layers: int
    interpret: bool = False
    layout: HeadLayout | None = None
    keeps_pairs: bool = False

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
        window: int | None = None,
    ) -> tuple[Float[Array, "rows heads head_dim"], KVPool]:
        """As `Attention.decode`. Rows that are not active write to page 0, which no row is given."""
        page_table, positions = self.without_inactive(page_table, positions, active, pool)
        kv = jnp.where(active[:, None, None], kv, 0)
        q, kv = q[:, None], kv[:, None]
        out, pages = self._run(q, kv, pool.pages, window, cache_seqlens=positions, block_table=page_table)
        return out[:, 0], pool._replace(pages=pages)

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
        """As `Attention.verify`. What is not real is written as zeros: to page 0 where the row has no page, else past
        its end."""
        page_table, positions = self.without_inactive(page_table, positions, num_tokens > 0, pool)
        is_real = jnp.arange(q.shape[1]) < num_tokens[:, None]
        kv = jnp.where(is_real[..., None, None], kv, 0)
        out, pages = self._run(q, kv, pool.pages, window, cache_seqlens=positions, block_table=page_table)
        return out, pool._replace(pages=pages)

    def without_inactive(
        self,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        active: Bool[Array, " rows"],
        pool: KVPool,
    ) -> tuple[Int[Array, "rows max_pages"], Int[Array, " rows"]]:
        """Page table and positions with those rows at position 0 of page 0 that are not active."""
        num_pages = pool.pages.shape[0] // self.num_layers
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
        window: int | None = None,
    ) -> tuple[Float[Array, "tokens heads head_dim"], KVPool]:
        """As `Attention.prefill`. Zeros for the padding."""
        # What flywheel's kernel would append must be keys apart from values, each token in a tile of its own, and those
        # two copies take longer than attention (bench/LOG.md).
        words = _words(kv if self.layout is None else self.layout.pack(kv), num_tokens)
        words = words.reshape(-1, pool.page_size, *words.shape[1:])
        own = jax.lax.dynamic_slice_in_dim(page_table, start // pool.page_size, len(words))
        pool = pool._replace(pages=_write(pool.pages, words, own, num_tokens, interpret=self.interpret))
        out, pages = self._run(
            q,
            kv,
            pool.pages,
            window,
            appends=False,
            cache_seqlens=(start + num_tokens)[None],
            block_table=page_table[None],
            cu_seqlens_q=jnp.stack((jnp.zeros_like(num_tokens), num_tokens)),
        )
        return out, pool._replace(pages=pages)

    def _run(
        self,
        q: Float[Array, "*batch heads head_dim"],
        kv: Float[Array, "*batch kv2 head_dim"],
        pages: Float[Array, "pages page_size rows2 width"],
        window: int | None,
        *,
        appends: bool = True,
        **where: Any,
    ) -> tuple[Float[Array, "*batch heads head_dim"], Float[Array, "pages page_size rows2 width"]]:
        (heads, head_dim), kv_heads = q.shape[-2:], kv.shape[-2] // 2
        if self.layout is not None:
            q, kv = self.layout.pack_queries(q, kv_heads), self.layout.pack(kv)
        out, pages = _kernel()(
            q,
            pages,
            None,
            *(_keys_and_values(kv, keeps_pairs=self.keeps_pairs) if appends else ()),
            softmax_scale=head_dim**-0.5,
            causal=True,
            window_size=_window_size(window),
            interpret=self.interpret,
            **where,
        )
        return out if self.layout is None else self.layout.unpack(out, heads, kv_heads, head_dim), pages


def _keys_and_values(
    kv: Float[Array, "*batch kv2 head_dim"], *, keeps_pairs: bool = False
) -> tuple[Float[Array, "*batch kv head_dim"], Float[Array, "*batch kv head_dim"]]:
    """What `interleave_kv` put together, in a way that XLA sees through."""
    *batch, _, head_dim = kv.shape
    # To XLA two slices next to each other are the whole, but not where there are more dimensions.
    pairs = kv.reshape(*([math.prod(batch)] if keeps_pairs else batch), -1, 2, head_dim)
    keys, values = (pairs[..., part, :].reshape(*batch, -1, head_dim) for part in range(2))
    return keys, values


def _words(kv: Float[Array, "tokens rows2 width"], num_tokens: Int[Array, ""]) -> UInt32[Array, "tokens rows width"]:
    """A key's and its value's numbers as the halves of one word, the key's the lower one; 0 from `num_tokens` on.

    In the tiles of a page those are the bytes of keys and values that alternate, and XLA makes them in a seventh of the
    time.
    """
    # In the tiles of pages any of this would take five times as long: the barrier keeps XLA from it.
    is_real = (jnp.arange(len(kv)) < num_tokens)[:, None, None]
    # With one row's dimension before, as `interleave_kv` had it, for XLA to see through both.
    keys, values = (jnp.where(is_real, part, 0) for part in _keys_and_values(kv[None]))
    low, high = (jax.lax.bitcast_convert_type(part, jnp.uint16).astype(jnp.uint32) for part in (keys, values))
    words: Array = jax.lax.optimization_barrier((low | (high << 16))[0])
    return words


def _of_words(words: UInt32[Array, "*batch rows width"]) -> Float[Array, "*batch rows2 width"]:
    """The keys and values, which alternate, that `_words` was given."""
    halves = (words.astype(jnp.uint16), (words >> 16).astype(jnp.uint16))
    return interleave_kv(*(jax.lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves))


def _write(
    pages: Float[Array, "pages page_size rows2 width"],
    words: UInt32[Array, "some page_size rows width"],
    targets: Int[Array, " some"],
    num_tokens: Int[Array, ""],
    *,
    interpret: bool,
) -> Float[Array, "pages page_size rows2 width"]:
    """`pages` with the first of those that `words` hold, with `num_tokens` in all, in place of `targets`.

    XLA's scatter would copy the pool to other tiles.
    """
    page_size = words.shape[1]
    # The interpreter cannot look at pages as words.
    new = _of_words(words) if interpret else words

    def kernel(targets: Any, num_tokens: Any, new: Any, _pages: Any, pages: Any, sem: Any) -> None:
        pages = pages if interpret else pages.bitcast(jnp.uint32)

        def copy(index: Any) -> Any:
            return pltpu.make_async_copy(new.at[index], pages.at[targets[index]], sem)

        num_pages = pl.cdiv(num_tokens[0], page_size)
        jax.lax.fori_loop(0, num_pages, lambda index, _: copy(index).start(), None)
        jax.lax.fori_loop(0, num_pages, lambda index, _: copy(index).wait(), None)

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    written: Array = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[in_hbm, in_hbm],
            out_specs=in_hbm,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={3: 0},  # Counted with the two prefetched arguments.
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="write_pages",
    )(targets, num_tokens[None], new, pages)
    return written


def _window_size(window: int | None) -> tuple[int, int]:
    """How many keys before and after a query's own the kernels take; -1: all that the causal mask leaves."""
    return (-1, -1) if window is None else (window - 1, 0)


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
