"""What an implementation of attention does."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from jaxllama.model.cache import KVPool


@runtime_checkable
class Attention(Protocol):
    """Writes new keys and values to the cache and attends to it, on one device, with its heads, rows and pages.

    Hashable: it is static under `jax.jit`. `ShardedAttention` runs it on a mesh.

    `kv` is interleaved by head (K0 V0 K1 V1 …). Page tables hold pages of the layer at hand (already offset). What a
    kernel wants of the engine and of the rest of the model is in its platform's description (`platforms`).
    A query sees the last `window` tokens, itself included; None: all before it.
    """

    def validate(self, *, page_size: int, num_rows: int, table_width: int) -> None:
        """Raises: ConfigError if it cannot work with pages of `page_size` tokens or a page table of that size."""
        ...

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
        """One token a row, at its position. Rows that are not active write nothing; what they return is not read."""
        ...

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
        """A few tokens a row, of which the first `num_tokens` are real, from its position on.

        What is not real writes nothing that a row can reach, and what it returns is not read.
        """
        ...

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
        """A chunk of one row from position `start`, of which `num_tokens` are real."""
        ...
