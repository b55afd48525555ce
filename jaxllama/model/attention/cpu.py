"""Paged attention by the kernels of `jaxllama.model.native`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array

from jaxllama.model import native
from jaxllama.model.attention.reference import ReferenceAttention
from jaxllama.model.cache import KVPool


@dataclass(frozen=True)
class CpuAttention(ReferenceAttention):
    """`Attention` for one CPU."""

    def _attend(self, q: Array, pool: KVPool, page_table: Array, positions: Array, window: int | None) -> Array:
        assert window is None, "windows have no kernel here"
        return native.attend(q, pool, page_table, positions)

    def _attend_once(
        self, q: Array, pool: KVPool, page_table: Array, positions: Array, active: Array, window: int | None
    ) -> Array:
        # A row that is not active has one key to attend to.
        return self._attend(q[:, None], pool, page_table, positions[:, None], window)[:, 0]
