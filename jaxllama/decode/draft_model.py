"""A smaller model of the same vocabulary that drafts, on the device, before each verification.

It draws with the noise of the model that it drafts for, by the same parameters, so that the two say the same wherever
their distributions are alike enough. Its keys and values lie in pages of its own under the same page table. They may
end before the row does: where drafts were all right, where a step was plain, where drafts came from elsewhere. What is
missing goes in before the next draft. No bit of an answer depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxllama.decode.sampling import sample
from jaxllama.decode.state import DecodeState
from jaxllama.errors import ConfigError
from jaxllama.model.cache import KVPool
from jaxllama.model.config import LlamaConfig
from jaxllama.model.forward import NewKV, Pages, Queries, Transformer
from jaxllama.model.int8 import quantization
from jaxllama.model.params import Params
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.model.platforms.platform import Platform

_CATCH_UP_TOKENS = 8


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "platform"])
@dataclass(frozen=True)
class DraftModel:
    """Its weights and what is static about it; an argument of jitted functions like any other."""

    config: LlamaConfig
    params: Params
    platform: Platform

    @classmethod
    def of(cls, config: LlamaConfig, params: Params, mesh: Mesh, kv_dtype: Any) -> DraftModel:
        """On the mesh of the model that it drafts for, with a cache of `kv_dtype`.

        Raises: ConfigError where the mesh does not divide its KV heads.
        """
        parts = mesh.shape["kv"]
        if config.num_kv_heads % parts:
            raise ConfigError(
                f"the mesh splits the KV heads over {parts} devices, and the draft model has {config.num_kv_heads}: "
                f"give another draft, or a mesh whose tp has a smaller common divisor with the model's KV heads"
            )
        dtype, quantize = params["norm"].dtype, quantization(params)
        platform = describe_platform(config, mesh, dtype=dtype, kv_dtype=kv_dtype, quantize=quantize)
        return cls(config, params, platform)


class ModelDrafts(NamedTuple):
    """`tokens[row, :num[row]]`, the draft's cache, and of how many tokens it has keys and values if all are right."""

    tokens: Int[Array, "rows drafts"]
    pool: KVPool
    length: Int[Array, " rows"]


def draft_tokens(
    draft: DraftModel, state: DecodeState, num: Int[Array, " rows"], num_drafts: int, once: Int[Array, ""]
) -> ModelDrafts:
    """`num` (at most `num_drafts`) tokens that are thought to follow the last one of each of the first rows.

    Where it is 0 nothing runs, also for none. `once` is 1 whenever this runs (see `Transformer`).
    """
    assert state.draft_pool is not None
    run = _Run(draft, Transformer(draft.config, draft.params, draft.platform), state, num, once)
    length, pool = run.catch_up(state.draft_pool)
    made = _Made(jnp.int32(0), jnp.zeros((len(num), num_drafts), jnp.int32), run.rows.generated_counts, pool)
    # A loop of one round and not a branch, as in `steps`.
    most = jnp.max(num)
    made = jax.lax.while_loop(lambda made: made.place < jnp.minimum(most, 1), partial(run.first, length), made)
    made = jax.lax.while_loop(lambda made: made.place < most, run.next, made)
    return ModelDrafts(made.tokens, made.pool, jnp.where(num > 0, run.rows.length + num, length))


class _Made(NamedTuple):
    """`tokens[:, :place]`, the drafts so far, and how often each token is in its output and among them."""

    place: Int[Array, ""]
    tokens: Int[Array, "rows drafts"]
    counts: Int[Array, "rows vocab"]
    pool: KVPool


class _Run:
    """One call of `draft_tokens`."""

    def __init__(
        self, draft: DraftModel, model: Transformer, state: DecodeState, num: Int[Array, " rows"], once: Int[Array, ""]
    ) -> None:
        self.rows = jax.tree.map(lambda x: x[: len(num)], state.rows)
        self._attention = draft.platform.attention
        self._model = model
        self._page_table = state.page_table[: len(num)]
        self._num = num
        self._once = once

    def catch_up(self, pool: KVPool) -> tuple[Int[Array, " rows"], KVPool]:
        """Feeds what is missing of the rows that want drafts, but for their last two tokens at most."""
        enough = self.rows.length - 1

        def feed(carry: tuple[Int[Array, " rows"], KVPool]) -> tuple[Int[Array, " rows"], KVPool]:
            length, pool = carry
            count = jnp.where(self._num > 0, jnp.clip(enough - length, 0, _CATCH_UP_TOKENS), 0)
            _, pool = self._forward(pool, length, count, _CATCH_UP_TOKENS)
            return length + count, pool

        def is_behind(carry: tuple[Int[Array, " rows"], KVPool]) -> Bool[Array, ""]:
            return jnp.any((self._num > 0) & (carry[0] < enough))

        behind: tuple[Array, KVPool] = jax.lax.while_loop(is_behind, feed, (self.rows.draft_length, pool))
        return behind

    def first(self, length: Int[Array, " rows"], made: _Made) -> _Made:
        """The first draft, after the last token or the last two."""
        count = jnp.where(self._num > 0, self.rows.length + 1 - length, 0)
        hidden, pool = self._forward(made.pool, length, count, 2)
        own = hidden[jnp.arange(len(count)), jnp.maximum(count - 1, 0)]
        return self._drawn(made._replace(pool=pool), own)

    def next(self, made: _Made) -> _Made:
        """One more, after the draft before it."""
        active = made.place < self._num
        positions = self.rows.length + made.place

        def attend(q: Queries, kv: NewKV, pool: KVPool, pages: Pages, window: int | None) -> tuple[Queries, KVPool]:
            out, pool = self._attention.decode(q[:, 0], kv[:, 0], pool, pages, positions, active, window)
            return out[:, None], pool

        before = jax.lax.dynamic_slice_in_dim(made.tokens, made.place - 1, 1, axis=1)
        args = (before, positions[:, None], made.pool, self._page_table, attend, self._once, active.astype(jnp.int32))
        hidden, pool = self._model(*args)
        return self._drawn(made._replace(pool=pool), hidden[:, 0])

    def _forward(
        self, pool: KVPool, start: Int[Array, " rows"], count: Int[Array, " rows"], size: int
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        """Hidden states after `count` (at most `size`) tokens of each row, which it has, from the place `start` on."""
        places = jnp.minimum(jnp.arange(size), jnp.maximum(count - 1, 0)[:, None])
        positions = start[:, None] + places
        at = jnp.minimum(self.rows.history_start[:, None] + positions, self.rows.history.shape[1] - 1)
        tokens = jnp.take_along_axis(self.rows.history, at, axis=1)

        def attend(q: Queries, kv: NewKV, pool: KVPool, pages: Pages, window: int | None) -> tuple[Queries, KVPool]:
            return self._attention.verify(q, kv, pool, pages, start, count, window)

        return self._model(tokens, positions, pool, self._page_table, attend, self._once, count)

    def _drawn(self, made: _Made, hidden: Float[Array, "rows embed"]) -> _Made:
        rows, place = self.rows, made.place
        active = place < self._num
        logits = self._model.logits(hidden, jnp.max(jnp.where(active, 1 + jnp.arange(len(active)), 0)))
        tokens, _ = sample(
            _of_vocabulary(logits, made.counts.shape[1]),
            rows.sampling,
            generated_counts=made.counts,
            prompt_mask=rows.prompt_mask,
            suppress_stops=rows.min_remaining > place,
            positions=rows.length + 1 + place,
            active=active,
            mask_index=jnp.zeros_like(self._num),  # rows with masks have paths instead
        )
        # What is not finite may be drawn as anything, and goes into a table.
        tokens = jnp.minimum(tokens, made.counts.shape[1] - 1)
        return made._replace(
            place=place + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(made.tokens, tokens[:, None], place, axis=1),
            counts=made.counts.at[jnp.arange(len(tokens)), tokens].add(active.astype(jnp.int32)),
        )


def _of_vocabulary(logits: Float[Array, "rows own"], size: int) -> Float[Array, "rows vocab"]:
    """Of models of one tokenizer some have more rows of padding than others."""
    missing = max(0, size - logits.shape[1])
    return jnp.pad(logits[:, :size], ((0, 0), (0, missing)), constant_values=jnp.finfo(jnp.float32).min)
