"""Paged attention by the kernels of `jaxllama.model.native`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Bool, Float, Int

from jaxllama.model import native
from jaxllama.model.attention.reference import KernelAttention
from jaxllama.model.cache import KVPool


@dataclass(frozen=True)
class CpuAttention(KernelAttention):
    """`Attention` for one CPU device, of `num_callers` in this process that attend at once."""

    num_callers: int = 1

    def _attend(
        self,
        q: Float[Array, "rows tokens heads head_dim"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        positions: Int[Array, "rows tokens"],
        window: int | None,
    ) -> Float[Array, "rows tokens heads head_dim"]:
        return native.attend(q, pool, page_table, positions, window, self.num_callers)

    def _idle_position(
        self, positions: Int[Array, " rows"], active: Bool[Array, " rows"], window: int | None
    ) -> Int[Array, ""] | int:
        return 0  # one key: rows do not wait for each other here
