"""Prefill and decode: pure functions over the weights and a `DecodeState`, jitted with the state donated.

A prompt's last token is not prefilled: it is the first input of `decode_steps`, so that every token is sampled in one
place and a prefill never needs the head.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxllama.decode.sampling import (
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    SamplingArrays,
    SamplingParams,
    sample,
    top_logprobs,
)
from jaxllama.model.attention import ReferenceAttention, ShardedAttention
from jaxllama.model.attention.reference import chunk_positions
from jaxllama.model.cache import KVPool, kv_pool_axes, kv_pool_shapes
from jaxllama.model.config import LlamaConfig
from jaxllama.model.forward import Llama
from jaxllama.model.mesh import num_page_shards, partition_spec
from jaxllama.model.params import Params
from jaxllama.text.structured import num_mask_words

MAX_STEPS = 32
COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
"""Keeps a row's bits independent of the number of rows. On CPUs, XLA gives large reductions to a library that sums in
another order than its own loops, which it uses for small ones; the library's products do not depend on the number of
rows. The option is XLA's for CPUs; the compilers for TPUs and CUDA take and ignore it (JAX 0.11 and 0.12)."""

REFERENCE = ShardedAttention(ReferenceAttention())
NOT_FINITE = -2
"""Stands in `StepOutput.tokens` for a row whose logits were not finite."""


def programs_agree(mesh: Mesh, params: Params) -> bool:
    """Whether all programs write the same bits for a token: `prefill` of any size from any page, and `decode_steps`.

    Measured to be so in bfloat16 on CPUs, by our kernels (`native`) and through XLA, on one device or more but `data` 1
    (bench/LOG.md; a test repeats it). In float32 it is not: sums are taken in another order. Nothing is known of other
    devices.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return is_cpu and mesh.shape["data"] == 1 and params["norm"].dtype == jnp.bfloat16


class DecodeState(NamedTuple):
    """Everything that decoding changes, for a fixed number of rows. Every field is always an array of one shape.

    `lengths` counts the tokens of a row whose keys and values are written; `last_token` is the next to go in.
    `remaining` is the budget, `min_remaining` how many more tokens must come before a stop id may.
    """

    pool: KVPool
    page_table: Int[Array, "rows max_pages"]
    lengths: Int[Array, " rows"]
    last_token: Int[Array, " rows"]
    remaining: Int[Array, " rows"]
    min_remaining: Int[Array, " rows"]
    active: Bool[Array, " rows"]
    generated_counts: Int[Array, "rows vocab"]
    prompt_mask: Bool[Array, "rows vocab"]
    sampling: SamplingArrays


class RowState(NamedTuple):
    """One row as the host makes it (NumPy), for `insert`. Fields as in `DecodeState`, without the row dimension."""

    length: np.int32
    last_token: np.int32
    remaining: np.int32
    min_remaining: np.int32
    generated_counts: np.ndarray
    prompt_mask: np.ndarray
    sampling: SamplingArrays


class StepOutput(NamedTuple):
    """The first `num_steps` of it count. A token is -1 where the row was inactive, `NOT_FINITE` where it failed."""

    tokens: Int[Array, "steps rows"]
    num_steps: Int[Array, ""]
    logprobs: Float[Array, "steps rows"]
    top_ids: Int[Array, "steps rows 20"]
    top_logprobs: Float[Array, "steps rows 20"]


# Trees of the same form that hold something else than arrays: axes, shapes, one row's NumPy values.
_state_of: Any = DecodeState
_sampling_of: Any = SamplingArrays

_STATE_AXES: DecodeState = _state_of(
    pool=None,  # `state_shardings` sets it: an int8 pool has more parts
    page_table=("rows", None),
    lengths=("rows",),
    last_token=("rows",),
    remaining=("rows",),
    min_remaining=("rows",),
    active=("rows",),
    generated_counts=("rows", "vocab"),
    prompt_mask=("rows", "vocab"),
    sampling=_sampling_of(
        temperature=("rows",),
        top_p=("rows",),
        min_p=("rows",),
        top_k=("rows",),
        presence_penalty=("rows",),
        frequency_penalty=("rows",),
        repetition_penalty=("rows",),
        seed=("rows", None),
        stop_ids=("rows", None),
        logit_bias=("rows", "vocab"),
        is_biased=("rows",),
        num_logprobs=("rows",),
        is_masked=("rows",),
        token_mask=("rows", None),
    ),
)


def state_shapes(
    config: LlamaConfig,
    *,
    num_rows: int,
    num_pages: int,
    page_size: int,
    max_context: int,
    dtype: Any,
    num_shards: int = 1,
) -> DecodeState:
    """The shapes and dtypes of a `DecodeState` with a pool of `dtype`.

    `num_pages` are those of each shard (see `ShardedAttention`) and count page 0, given to no row.
    """
    f32, i32 = jnp.float32, jnp.int32

    def rows(dtype: Any, *rest: int) -> Any:
        return jax.ShapeDtypeStruct((num_rows, *rest), dtype)

    shapes: DecodeState = _state_of(
        pool=kv_pool_shapes(config, num_pages, page_size, dtype, num_shards),
        page_table=rows(i32, -(-max_context // page_size)),
        lengths=rows(i32),
        last_token=rows(i32),
        remaining=rows(i32),
        min_remaining=rows(i32),
        active=rows(jnp.bool_),
        generated_counts=rows(i32, config.vocab_size),
        prompt_mask=rows(jnp.bool_, config.vocab_size),
        sampling=_sampling_of(
            temperature=rows(f32),
            top_p=rows(f32),
            min_p=rows(f32),
            top_k=rows(i32),
            presence_penalty=rows(f32),
            frequency_penalty=rows(f32),
            repetition_penalty=rows(f32),
            seed=rows(jnp.uint32, 2),
            stop_ids=rows(i32, MAX_STOP_TOKEN_IDS + len(config.eos_token_ids) + 1),
            logit_bias=rows(f32, config.vocab_size),
            is_biased=rows(jnp.bool_),
            num_logprobs=rows(i32),
            is_masked=rows(jnp.bool_),
            token_mask=rows(jnp.uint32, num_mask_words(config.vocab_size)),
        ),
    )
    return shapes


def state_shardings(config: LlamaConfig, mesh: Mesh, shapes: DecodeState) -> DecodeState:
    """Rows over `data`, pages over `data` and `rep`, KV heads over `kv`, vocabulary over `kv` and `rep`."""
    axes = _STATE_AXES._replace(pool=kv_pool_axes(shapes.pool.pages.dtype))
    shardings: DecodeState = _shardings(axes, config, mesh, num_rows=shapes.lengths.shape[0])
    return shardings


def _shardings(axes: Any, config: LlamaConfig, mesh: Mesh, num_rows: int | None = None) -> Any:
    return jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names, config, mesh, num_rows=num_rows)),
        axes,
        is_leaf=lambda x: type(x) is tuple,
    )


def make_pool(config: LlamaConfig, mesh: Mesh, *, num_pages: int, page_size: int, dtype: Any) -> KVPool:
    """An empty pool by itself, for `prefill_logits`."""
    shapes = kv_pool_shapes(config, num_pages, page_size, dtype, num_page_shards(mesh))
    shardings = _shardings(kv_pool_axes(dtype), config, mesh)
    pool: KVPool = jax.tree.map(lambda s, where: jnp.zeros(s.shape, s.dtype, device=where), shapes, shardings)
    return pool


def make_state(shapes: DecodeState, shardings: DecodeState) -> DecodeState:
    """An empty state, made on the devices that hold it."""
    zeros = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=shardings)
    return zeros()


def row_state(
    config: LlamaConfig,
    params: SamplingParams,
    *,
    prompt: list[int],
    generated: list[int],
    remaining: int,
    seed: int,
    halt_id: int | None = None,
) -> RowState:
    """The row that continues `prompt + generated` (`generated` is not empty after a preemption).

    `remaining` is the number of tokens still to come at most. Its last token is the row's next input. `halt_id` makes
    the row inactive as stop ids do. It begins without a mask.
    """
    vocab = config.vocab_size
    prompt_mask = np.zeros(vocab, np.bool_)
    prompt_mask[prompt] = True
    counts = np.bincount(np.asarray(generated, np.int64), minlength=vocab).astype(np.int32)
    bias = np.zeros(vocab, np.float32)
    bias[list(params.logit_bias)] = list(params.logit_bias.values())
    stops = [*params.stop_token_ids, *(() if params.ignore_eos else config.eos_token_ids)]
    stops += [] if halt_id is None else [halt_id]
    stop_ids = np.full(MAX_STOP_TOKEN_IDS + len(config.eos_token_ids) + 1, -1, np.int32)
    stop_ids[: len(stops)] = stops
    f32 = np.float32
    sampling = _sampling_of(
        temperature=f32(params.temperature),
        top_p=f32(params.top_p),
        min_p=f32(params.min_p),
        top_k=np.int32(params.top_k),
        presence_penalty=f32(params.presence_penalty),
        frequency_penalty=f32(params.frequency_penalty),
        repetition_penalty=f32(params.repetition_penalty),
        seed=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        stop_ids=stop_ids,
        logit_bias=bias,
        is_biased=np.bool_(bias.any()),
        num_logprobs=np.int32(-1 if params.logprobs is None else params.logprobs),
        is_masked=np.bool_(False),
        token_mask=np.full(num_mask_words(vocab), 0xFFFFFFFF, np.uint32),
    )
    ids = prompt + generated
    return RowState(
        length=np.int32(len(ids) - 1),
        last_token=np.int32(ids[-1]),
        remaining=np.int32(remaining),
        min_remaining=np.int32(max(0, params.min_tokens - len(generated))),
        generated_counts=counts,
        prompt_mask=prompt_mask,
        sampling=sampling,
    )


def any_row(config: LlamaConfig) -> RowState:
    """A row of no request, for its shapes and dtypes."""
    return row_state(config, SamplingParams(), prompt=[0], generated=[], remaining=1, seed=0)


@partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, row: Int[Array, ""], new: RowState) -> DecodeState:
    """Puts a row in place and makes it active. Its pages must be written (`prefill`) before the next `decode_steps`."""

    def put(array: jax.Array, value: Any) -> jax.Array:
        return array.at[row].set(jnp.asarray(value, array.dtype))

    return state._replace(
        lengths=put(state.lengths, new.length),
        last_token=put(state.last_token, new.last_token),
        remaining=put(state.remaining, new.remaining),
        min_remaining=put(state.min_remaining, new.min_remaining),
        active=put(state.active, True),
        generated_counts=put(state.generated_counts, new.generated_counts),
        prompt_mask=put(state.prompt_mask, new.prompt_mask),
        sampling=jax.tree.map(put, state.sampling, new.sampling),
    )


@partial(jax.jit, donate_argnames="pool", static_argnames=("config", "attention"), compiler_options=COMPILER_OPTIONS)
def prefill(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    tokens: Int[Array, " chunk"],
    page_table: Int[Array, " max_pages"],
    start: Int[Array, ""],
    num_tokens: Int[Array, ""],
    shard: Int[Array, ""],
    *,
    attention: ShardedAttention = REFERENCE,
) -> KVPool:
    """Writes the keys and values of one chunk of one row's prompt and returns the pool.

    `tokens[:num_tokens]` stand at positions `start …`; the rest is padding. `start` and the chunk's size are multiples
    of the page size. The row is one of `shard`.
    """
    return _forward_chunk(config, params, pool, tokens, page_table, start, num_tokens, shard, attention)[1]


@partial(jax.jit, donate_argnames="pool", static_argnames=("config", "attention"), compiler_options=COMPILER_OPTIONS)
def prefill_logits(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    tokens: Int[Array, " chunk"],
    page_table: Int[Array, " max_pages"],
    start: Int[Array, ""],
    num_tokens: Int[Array, ""],
    shard: Int[Array, ""],
    *,
    attention: ShardedAttention = REFERENCE,
) -> tuple[Float[Array, "chunk vocab"], KVPool]:
    """`prefill` that also returns the logits of every position of the chunk."""
    hidden, pool = _forward_chunk(config, params, pool, tokens, page_table, start, num_tokens, shard, attention)
    return Llama(config, params, attention).logits(hidden), pool


@partial(jax.jit, donate_argnames="pool", static_argnames=("config", "attention"))
def clear(
    config: LlamaConfig,
    pool: KVPool,
    pages: Int[Array, " max_pages"],
    count: Int[Array, ""],
    shard: Int[Array, ""],
    *,
    attention: ShardedAttention = REFERENCE,
) -> KVPool:
    """Zeros in the first `count` of `pages`, for attention that must not meet a failed row's NaN there."""
    return attention.clear_pages(pool, pages, count, shard, config.num_layers)


@partial(jax.jit, static_argnames=("config", "attention"))
def copy_out(
    config: LlamaConfig,
    pool: KVPool,
    pages: Int[Array, " some"],
    shard: Int[Array, ""],
    *,
    attention: ShardedAttention = REFERENCE,
) -> KVPool:
    """What `pages` hold, as `cache.read_pages`."""
    return attention.read_pages(pool, pages, shard, config.num_layers)


@partial(jax.jit, donate_argnames="pool", static_argnames=("config", "attention"))
def copy_in(
    config: LlamaConfig,
    pool: KVPool,
    pages: Int[Array, " some"],
    copy: KVPool,
    shard: Int[Array, ""],
    *,
    attention: ShardedAttention = REFERENCE,
) -> KVPool:
    """Puts back what `copy_out` gave, as `cache.put_pages`."""
    return attention.put_pages(pool, pages, copy, shard, config.num_layers)


def _forward_chunk(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    tokens: Array,
    page_table: Array,
    start: Array,
    num_tokens: Array,
    shard: Array,
    attention: ShardedAttention,
) -> tuple[Float[Array, "chunk embed"], KVPool]:
    positions = chunk_positions(tokens.shape[0], start, num_tokens)[None]

    def attend(q: Array, kv: Array, pool: KVPool, pages: Array) -> tuple[Array, KVPool]:
        out, pool = attention.prefill(q[0], kv[0], pool, pages[0], start, num_tokens, shard)
        return out[None], pool

    once = jnp.minimum(num_tokens, 1)  # 0 in the runs that only compile
    hidden, pool = Llama(config, params, attention)(tokens[None], positions, pool, page_table[None], attend, once)
    return hidden[0], pool


@partial(
    jax.jit,
    donate_argnames="state",
    static_argnames=("config", "num_rows", "attention"),
    compiler_options=COMPILER_OPTIONS,
)
def decode_steps(
    config: LlamaConfig,
    params: Params,
    state: DecodeState,
    max_steps: Int[Array, ""],
    keep: Bool[Array, " rows"],
    *,
    num_rows: int,
    attention: ShardedAttention = REFERENCE,
) -> tuple[DecodeState, StepOutput]:
    """Decodes up to `max_steps` (≤ `MAX_STEPS`) tokens for the first `num_rows` rows, sampling included.

    Stops early when no row is active. Rows that `keep` denies become inactive first. Rows end on the device, by stop id
    or budget. Pages for `max_steps` more tokens must be in the page table.
    """
    state = state._replace(active=state.active & keep)
    model = Llama(config, params, attention)
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
        return (out.num_steps < max_steps) & jnp.any(state.active[:num_rows])

    def step(carry: tuple[DecodeState, StepOutput]) -> tuple[DecodeState, StepOutput]:
        return _decode_step(config, model, *carry, once, num_rows=num_rows, attention=attention)

    return jax.lax.while_loop(unfinished, step, (state, out))


def _decode_step(
    config: LlamaConfig,
    model: Llama,
    state: DecodeState,
    out: StepOutput,
    once: Array,
    *,
    num_rows: int,
    attention: ShardedAttention,
) -> tuple[DecodeState, StepOutput]:
    some = slice(0, num_rows)
    active, positions = state.active[some], state.lengths[some]
    sampling = jax.tree.map(lambda x: x[some], state.sampling)

    def attend(q: Array, kv: Array, pool: KVPool, pages: Array) -> tuple[Array, KVPool]:
        out, pool = attention.decode(q[:, 0], kv[:, 0], pool, pages, positions, active)
        return out[:, None], pool

    tokens, page_table = state.last_token[some, None], state.page_table[some]
    hidden, pool = model(tokens, positions[:, None], state.pool, page_table, attend, once)
    logits = model.logits(hidden[:, 0])
    tokens, is_finite = sample(
        logits,
        sampling,
        generated_counts=state.generated_counts[some],
        prompt_mask=state.prompt_mask[some],
        suppress_stops=state.min_remaining[some] > 0,
        positions=positions + 1,
        active=active,
    )
    logprobs = top_logprobs(logits, tokens, jnp.any(active & (sampling.num_logprobs >= 0)))
    is_stop = jnp.any(tokens[:, None] == sampling.stop_ids, axis=1)
    ends = is_stop | (state.remaining[some] <= 1) | ~is_finite
    emitted = active & is_finite
    step = out.num_steps
    out = StepOutput(
        tokens=out.tokens.at[step].set(jnp.where(active, jnp.where(is_finite, tokens, NOT_FINITE), -1)),
        num_steps=step + 1,
        logprobs=out.logprobs.at[step].set(logprobs.chosen),
        top_ids=out.top_ids.at[step].set(logprobs.ids),
        top_logprobs=out.top_logprobs.at[step].set(logprobs.values),
    )
    state = state._replace(
        pool=pool,
        lengths=state.lengths.at[some].add(active),
        last_token=state.last_token.at[some].set(jnp.where(emitted, tokens, state.last_token[some])),
        remaining=state.remaining.at[some].add(-emitted.astype(jnp.int32)),
        min_remaining=state.min_remaining.at[some].add(-(emitted & (state.min_remaining[some] > 0)).astype(jnp.int32)),
        active=state.active.at[some].set(active & ~ends),
        generated_counts=state.generated_counts.at[jnp.arange(num_rows), tokens].add(emitted.astype(jnp.int32)),
    )
    return state, out
