"""Paged attention by the kernels of `jaxllama.model.native`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Bool, Float, Int

from jaxllama.model import native
from jaxllama.model.attention.reference import ReferenceAttention
from jaxllama.model.cache import KVPool


@dataclass(frozen=True)
class CpuAttention(ReferenceAttention):
    """`Attention` for one CPU."""

    def _attend(
        self,
        q: Float[Array, "rows tokens heads head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, "rows tokens"],
        window: int | None,
    ) -> Float[Array, "rows tokens heads head_dim"]:
        assert window is None, "windows have no kernel here"
        return native.attend(q, pool, page_table, positions)

    def _attend_once(
        self,
        q: Float[Array, "rows heads head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, " rows"],
        active: Bool[Array, " rows"],
        window: int | None,
    ) -> Float[Array, "rows heads head_dim"]:
        # A row that is not active has one key to attend to.
        return self._attend(q[:, None], pool, page_table, positions[:, None], window)[:, 0]
