"""Prefill and decode: pure functions over the weights and a `DecodeState`, jitted with the state donated.

A prompt's last token is not prefilled: it is the first input of `decode_steps`, so that every token is sampled in one
place and a prefill never needs the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllama.decode.params import MAX_TOP_LOGPROBS
from jaxllama.decode.sampling import sample, top_logprobs
from jaxllama.decode.state import MAX_STEPS, NOT_FINITE, Chunk, DecodeState, Place, SteeringArrays, StepOutput
from jaxllama.model.attention.reference import chunk_positions
from jaxllama.model.cache import KVPool
from jaxllama.model.config import LlamaConfig
from jaxllama.model.forward import Transformer
from jaxllama.model.params import Params
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.platforms.program import program


@program(donate_argnames="pool", static_argnames=("config",))
def prefill(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    place: Place,
    chunk: Chunk,
    *,
    platform: Platform = PLAIN,
) -> KVPool:
    """Writes the keys and values of one chunk of one row's prompt and returns the pool."""
    return forward_chunk(config, params, pool, place, chunk, platform)[1]


@program(donate_argnames="pool", static_argnames=("config",))
def prefill_logits(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    place: Place,
    chunk: Chunk,
    *,
    platform: Platform = PLAIN,
) -> tuple[Float[Array, "chunk vocab"], KVPool]:
    """`prefill` that also returns the logits of every position of the chunk."""
    hidden, pool = forward_chunk(config, params, pool, place, chunk, platform)
    return Transformer(config, params, platform).logits(hidden), pool


def forward_chunk(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    place: Place,
    chunk: Chunk,
    platform: Platform,
) -> tuple[Float[Array, "chunk embed"], KVPool]:
    """The normalised hidden states of a chunk, and the pool with its keys and values."""
    (page_table, shard), (tokens, start, num_tokens) = place, chunk
    positions = chunk_positions(tokens.shape[0], start, num_tokens)[None]

    def attend(q: Array, kv: Array, pool: KVPool, pages: Array, window: int | None) -> tuple[Array, KVPool]:
        out, pool = platform.attention.prefill(q[0], kv[0], pool, pages[0], start, num_tokens, shard, window)
        return out[None], pool

    once = jnp.minimum(num_tokens, 1)  # 0 in the runs that only compile
    model = Transformer(config, params, platform)
    hidden, pool = model(tokens[None], positions, pool, page_table[None], attend, once, num_tokens[None])
    return hidden[0], pool


type LogitsProcessor = Callable[[Array, DecodeState], Array]
"""`(logits [rows, vocab], state) -> logits`: a pure JAX function between the model and the sampling controls. What it
gives is drawn from; log-probabilities stay those of the model. One function is one program: define it once."""


@program(donate_argnames="state", static_argnames=("config", "num_rows", "steers", "logits_processor"))
def decode_steps(
    config: LlamaConfig,
    params: Params,
    state: DecodeState,
    max_steps: Int[Array, ""],
    keep: Bool[Array, " rows"],
    *,
    num_rows: int,
    steers: bool = False,
    logits_processor: LogitsProcessor | None = None,
    platform: Platform = PLAIN,
) -> tuple[DecodeState, StepOutput]:
    """Decodes up to `max_steps` (≤ `MAX_STEPS`) tokens for the first `num_rows` rows, sampling included.

    Stops early when no row is active. Rows that `keep` denies become inactive first. Rows end on the device, by stop id
    or budget. Pages for `max_steps` more tokens must be in the page table. Without `steers` the rows' steering is not
    looked at.
    """
    state = state._replace(rows=state.rows._replace(active=state.rows.active & keep))
    model = Transformer(config, params, platform)
    num_top = min(MAX_TOP_LOGPROBS, config.vocab_size)
    once = jnp.minimum(max_steps, 1)
    out = StepOutput(
        tokens=jnp.full((MAX_STEPS, num_rows), -1, jnp.int32),
        num_steps=jnp.int32(0),
        logprobs=jnp.zeros((MAX_STEPS, num_rows)),
        top_ids=jnp.zeros((MAX_STEPS, num_rows, num_top), jnp.int32),
        top_logprobs=jnp.zeros((MAX_STEPS, num_rows, num_top)),
    )

    def unfinished(carry: tuple[DecodeState, StepOutput]) -> jax.Array:
        state, out = carry
        return (out.num_steps < max_steps) & jnp.any(state.rows.active[:num_rows])

    def step(carry: tuple[DecodeState, StepOutput]) -> tuple[DecodeState, StepOutput]:
        return _decode_step(config, model, *carry, once, num_rows, steers, logits_processor, platform)

    return jax.lax.while_loop(unfinished, step, (state, out))


def steered(
    steering: SteeringArrays, layer: int, x: Float[Array, "rows tokens embed"]
) -> Float[Array, "rows tokens embed"]:
    """The residual stream that leaves `layer`, with the vectors of the rows that want it there."""
    vector = steering.vector[:, None]
    # Where nothing is added no bit changes: -0 + 0 would be 0.
    is_changed = (steering.layer == layer)[:, None, None] & (vector != 0)
    return jnp.where(is_changed, x + vector.astype(x.dtype), x)


def next_logits(
    model: Transformer,
    state: DecodeState,
    once: Int[Array, ""],
    num_rows: int,
    *,
    steers: bool = False,
    platform: Platform = PLAIN,
) -> tuple[Float[Array, "rows vocab"], KVPool]:
    """The logits after the last token of each of the first `num_rows` rows, and the pool with that token's keys and
    values. Those of rows that are not active mean nothing."""
    rows = jax.tree.map(lambda x: x[:num_rows], state.rows)
    active, positions = rows.active, rows.length

    def attend(q: Array, kv: Array, pool: KVPool, pages: Array, window: int | None) -> tuple[Array, KVPool]:
        out, pool = platform.attention.decode(q[:, 0], kv[:, 0], pool, pages, positions, active, window)
        return out[:, None], pool

    tokens, page_table = rows.last_token[:, None], state.page_table[:num_rows]
    steer = partial(steered, rows.steering) if steers else None
    written = active.astype(jnp.int32)
    hidden, pool = model(tokens, positions[:, None], state.pool, page_table, attend, once, written, steer)
    return model.logits(hidden[:, 0], jnp.max(jnp.where(active, 1 + jnp.arange(num_rows), 0))), pool


def _decode_step(
    config: LlamaConfig,
    model: Transformer,
    state: DecodeState,
    out: StepOutput,
    once: Array,
    num_rows: int,
    steers: bool,
    logits_processor: LogitsProcessor | None,
    platform: Platform,
) -> tuple[DecodeState, StepOutput]:
    some = slice(0, num_rows)
    rows = jax.tree.map(lambda x: x[some], state.rows)
    active, positions, sampling = rows.active, rows.length, rows.sampling
    logits, pool = next_logits(model, state, once, num_rows, steers=steers, platform=platform)
    offered = logits
    if logits_processor is not None:
        # A token of minus infinity is forbidden; what the model says must be finite.
        offered = jnp.maximum(logits_processor(logits, state), jnp.finfo(jnp.float32).min)
    tokens, is_finite = sample(
        offered,
        sampling,
        generated_counts=rows.generated_counts,
        prompt_mask=rows.prompt_mask,
        suppress_stops=rows.min_remaining > 0,
        positions=positions + 1,
        active=active,
    )
    logprobs = top_logprobs(logits, tokens, jnp.any(active & (sampling.num_logprobs >= 0)))
    is_stop = jnp.any(tokens[:, None] == sampling.stop_ids, axis=1)
    ends = is_stop | (rows.remaining <= 1) | ~is_finite
    emitted = active & is_finite
    step = out.num_steps
    out = StepOutput(
        tokens=out.tokens.at[step].set(jnp.where(active, jnp.where(is_finite, tokens, NOT_FINITE), -1)),
        num_steps=step + 1,
        logprobs=out.logprobs.at[step].set(logprobs.chosen),
        top_ids=out.top_ids.at[step].set(logprobs.ids),
        top_logprobs=out.top_logprobs.at[step].set(logprobs.values),
    )
    all_rows = state.rows
    new_rows = all_rows._replace(
        length=all_rows.length.at[some].add(active),
        last_token=all_rows.last_token.at[some].set(jnp.where(emitted, tokens, rows.last_token)),
        remaining=all_rows.remaining.at[some].add(-emitted.astype(jnp.int32)),
        min_remaining=all_rows.min_remaining.at[some].add(-(emitted & (rows.min_remaining > 0)).astype(jnp.int32)),
        active=all_rows.active.at[some].set(active & ~ends),
        generated_counts=all_rows.generated_counts.at[jnp.arange(num_rows), tokens].add(emitted.astype(jnp.int32)),
    )
    return state._replace(pool=pool, rows=new_rows), out
