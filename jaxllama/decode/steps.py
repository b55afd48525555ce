"""Prefill and decode: pure functions over the weights and a `DecodeState`, jitted with the state donated.

A prompt's last token is not prefilled: it is the first input of `decode_steps`, so that every token is sampled in one
place and a prefill never needs the head.

With drafts a step may run the model over several tokens of each row: its last one and what is thought to follow. Their
logits go one position after another through the sampling of plain steps. A row goes on while the token that it draws
is the draft, for then the next position's logits are those that a plain step would have had. The noise of a draw
depends on seed and position alone, so this is exact at any temperature. What rejected drafts leave in the cache lies
past the row's end and is overwritten before anything attends to it.

What a masked row may say is known along its path alone (`drafts.Paths`), for which there are masks, one a token. Where
it has left that path it waits, and the dispatch ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllama.decode.draft_model import DraftModel, draft_tokens
from jaxllama.decode.drafts import (
    BY_MODEL,
    Ahead,
    Drafting,
    Drafts,
    Paths,
    chances,
    keeps_to,
    learned,
    look_ahead,
    look_up,
    rates,
    recovered,
)
from jaxllama.decode.params import MAX_TOP_LOGPROBS
from jaxllama.decode.sampling import sample, top_logprobs
from jaxllama.decode.state import (
    MAX_STEPS,
    NOT_FINITE,
    Chunk,
    DecodeState,
    Place,
    RowState,
    SteeringArrays,
    StepOutput,
    laid_out,
)
from jaxllama.model.attention.reference import chunk_positions
from jaxllama.model.cache import KVPool
from jaxllama.model.config import LlamaConfig
from jaxllama.model.forward import NewKV, Pages, Queries, Transformer
from jaxllama.model.params import Params
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.platforms.program import program


@program("pool", static_argnames=("config",))
def prefill(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    place: Place,
    chunk: Chunk,
    *,
    platform: Platform = PLAIN,
) -> KVPool:
    """Writes the keys and values of a chunk of a row's prompt, or of several (see `Chunk`), and returns the pool."""
    return forward_chunk(config, params, pool, place, chunk, platform)[1]


@program("pool", static_argnames=("config",), result=lambda pool: (None, pool))
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
) -> tuple[Float[Array, "*rows chunk embed"], KVPool]:
    """The normalised hidden states of a chunk, or of several, and the pool with its keys and values."""
    is_one = chunk.tokens.ndim == 1
    if is_one:
        place, chunk = jax.tree.map(lambda x: jnp.asarray(x)[None], (place, chunk))
    (page_table, shard), (tokens, start, num_tokens) = place, chunk
    tokens = platform.attention.split_rows(tokens)
    positions = jax.vmap(partial(chunk_positions, tokens.shape[1]))(start, num_tokens)

    def attend(q: Queries, kv: NewKV, pool: KVPool, pages: Pages, window: int | None) -> tuple[Queries, KVPool]:
        return platform.attention.prefill(q, kv, pool, pages, start, num_tokens, shard, window)

    once = jnp.minimum(jnp.max(num_tokens), 1)  # 0 in the runs that only compile
    model = Transformer(config, params, platform)
    hidden, pool = model(tokens, positions, pool, page_table, attend, once, num_tokens)
    return hidden[0] if is_one else hidden, pool


type LogitsProcessor = Callable[[Array, DecodeState], Array]
"""`(logits [rows, vocab], state) -> logits`: a pure JAX function between the model and the sampling controls. What it
gives is drawn from; log-probabilities stay those of the model. One function is one program: define it once."""


@program(
    "state",
    static_argnames=("config", "num_rows", "steers", "logits_processor", "num_drafts"),
    result=lambda state: (laid_out(state), None),
    is_step=True,
)
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
    num_drafts: int = 0,
    drafting: Drafting | None = None,
    draft: DraftModel | None = None,
    platform: Platform = PLAIN,
) -> tuple[DecodeState, StepOutput]:
    """Decodes up to `max_steps` (≤ `MAX_STEPS`) tokens for the first `num_rows` rows, sampling included.

    Stops early when no row is active. Rows that `keep` denies become inactive first. Rows end on the device, by stop id
    or budget. Pages for `max_steps` more tokens must be in the page table. Without `steers` the rows' steering is not
    looked at.

    With `num_drafts`, a state with a history, and `drafting`, a step verifies up to so many drafts a row where that
    pays; where programs of different sizes differ in bits (`Platform.programs_agree`) every step runs as if it did. It
    stops early too when a row has `drafting.max_tokens` new tokens; for so many there must be pages.
    There is no `logits_processor` then. Where nothing is found `draft` makes drafts; the state has a pool for it.
    """
    state = state._replace(rows=state.rows._replace(active=state.rows.active & keep))
    model = Transformer(config, params, platform)
    num_top = min(MAX_TOP_LOGPROBS, config.vocab_size)
    once = jnp.minimum(max_steps, 1)
    none = jnp.zeros(num_rows, jnp.int32)
    out = StepOutput(
        tokens=jnp.full((MAX_STEPS, num_rows), -1, jnp.int32),
        num_steps=jnp.int32(0),
        logprobs=jnp.zeros((MAX_STEPS, num_rows)),
        top_ids=jnp.zeros((MAX_STEPS, num_rows, num_top), jnp.int32),
        top_logprobs=jnp.zeros((MAX_STEPS, num_rows, num_top)),
        num_drafted=none,
        num_accepted=none,
        num_predicted=none,
        draft_length=state.rows.draft_length[:num_rows],
    )
    step = _Step(model, platform, num_rows, once, steers, logits_processor, draft)

    def unfinished(carry: tuple[DecodeState, StepOutput]) -> jax.Array:
        state, out = carry
        return (out.num_steps < max_steps) & jnp.any(state.rows.active[:num_rows])

    if not num_drafts:
        return jax.lax.while_loop(unfinished, lambda carry: step.plain(*carry), (state, out))
    assert drafting is not None
    assert logits_processor is None
    limits = drafting

    def has_room(carry: _Carry) -> jax.Array:
        rows = carry.state.rows.active[:num_rows]
        has_room = jnp.all(~rows | (carry.num_tokens < limits.max_tokens))
        return unfinished(carry[:2]) & has_room & ~jnp.any(carry.waits)

    num_tokens = num_rows * (num_drafts + 1)
    if platform.programs_agree:
        num_tokens = max(num_rows, min(num_tokens, platform.max_verified_tokens))
    carry = _Carry(state, out, none, jnp.zeros(num_rows, jnp.bool_), jnp.zeros((num_tokens, config.vocab_size)))
    carry = jax.lax.while_loop(has_room, lambda carry: step.with_drafts(carry, num_drafts, limits), carry)
    rows = carry.state.rows
    rows = rows._replace(active=rows.active.at[:num_rows].set(rows.active[:num_rows] | carry.waits))
    return carry.state._replace(rows=rows), carry.out._replace(draft_length=rows.draft_length[:num_rows])


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

    def attend(q: Queries, kv: NewKV, pool: KVPool, pages: Pages, window: int | None) -> tuple[Queries, KVPool]:
        out, pool = platform.attention.decode(q[:, 0], kv[:, 0], pool, pages, positions, active, window)
        return out[:, None], pool

    tokens, page_table = rows.last_token[:, None], state.page_table[:num_rows]
    steer = partial(steered, rows.steering) if steers else None
    written = active.astype(jnp.int32)
    hidden, pool = model(tokens, positions[:, None], state.pool, page_table, attend, once, written, steer)
    return model.logits(hidden[:, 0], jnp.max(jnp.where(active, 1 + jnp.arange(num_rows), 0))), pool


type _Drawn = tuple[RowState, StepOutput, Int[Array, " rows"], Bool[Array, " rows"], Int[Array, ""]]
type _Ran = tuple[Int[Array, ""], Float[Array, "tokens vocab"], Int[Array, " rows"], KVPool]


class _Carry(NamedTuple):
    """What goes from one step with drafts to the next: how many new tokens rows have, which of them need a mask before
    they go on (their state is not active meanwhile), and `logits` to be written."""

    state: DecodeState
    out: StepOutput
    num_tokens: Int[Array, " rows"]
    waits: Bool[Array, " rows"]
    logits: Float[Array, "tokens vocab"]


class _Verified(NamedTuple):
    """Drafts of which `num` a row are verified, or with a depth of 0 none, in a plain step where there are any.

    The draft model's cache will have keys and values of `draft_length` tokens of each row if they are right.
    """

    ahead: Ahead
    num: Int[Array, " rows"]
    depth: Int[Array, ""]
    draft_pool: KVPool | None
    draft_length: Int[Array, " rows"]


class _Step(NamedTuple):
    """A step of the first `num_rows` rows. `once` is 1 whenever it runs (see `Transformer`)."""

    model: Transformer
    platform: Platform
    num_rows: int
    once: Int[Array, ""]
    steers: bool
    logits_processor: LogitsProcessor | None
    draft: DraftModel | None = None

    def plain(self, state: DecodeState, out: StepOutput) -> tuple[DecodeState, StepOutput]:
        """One token of each active row."""
        logits, pool = self._forward(state, state.pool)
        offered = logits
        if self.logits_processor is not None:
            # A token of minus infinity is forbidden; what the model says must be finite.
            offered = jnp.maximum(self.logits_processor(logits, state), jnp.finfo(jnp.float32).min)
        active = state.rows.active[: self.num_rows]
        rows, out, _ = self._emit(state.rows, out, logits, offered, active, out.num_steps)
        return state._replace(pool=pool, rows=rows), out._replace(num_steps=out.num_steps + 1)

    def with_drafts(self, carry: _Carry, num_drafts: int, limits: Drafting) -> _Carry:
        """One token of each active row, and one more for each draft that is right."""
        state, rows, logits = carry.state, self._own(carry.state.rows), carry.logits
        is_masked, num_rows = rows.sampling.is_masked, self.num_rows
        paths = jax.tree.map(lambda x: jnp.asarray(x)[:num_rows], limits.paths)
        room = jnp.minimum(rows.remaining, limits.max_tokens - carry.num_tokens) - 1
        room = jnp.where(rows.active, room, 0)
        ahead = self._find_drafts(rows, paths, carry.num_tokens, room, num_drafts, limits)
        ahead, num, depth, draft_pool, draft_length = self._choose_drafts(state, ahead, room, limits, logits.shape[0])
        (drafts, _, is_predicted), state = ahead, state._replace(draft_pool=draft_pool)
        if self.platform.programs_agree:
            logits, first, pool = self._either(state, logits, drafts, num, depth > 0)
        else:
            logits, first, pool = self._forward_drafts(state, state.pool, drafts, num, logits.shape[0])
        out = carry.out._replace(num_drafted=carry.out.num_drafted + num, num_steps=carry.out.num_steps + 1)

        def draw(carry: _Drawn) -> _Drawn:
            all_rows, out, num_tokens, going, index = carry
            # Apart from what made it, so that it is read as a plain step reads its own.
            own = jax.lax.optimization_barrier(logits[first + jnp.minimum(index, num)])
            all_rows, out, tokens = self._emit(all_rows, out, own, own, going, num_tokens)
            is_hit = tokens == jnp.take(drafts.tokens, index, axis=1, mode="clip")
            acceptance = all_rows.acceptance[: self.num_rows]
            is_drafted = going & (index < drafts.num) & ~is_masked
            acceptance = learned(acceptance, drafts.suffix, is_drafted, is_hit)
            all_rows = all_rows._replace(acceptance=all_rows.acceptance.at[: self.num_rows].set(acceptance))
            is_right = going & (index < num) & is_hit
            out = out._replace(
                num_accepted=out.num_accepted + is_right,
                num_predicted=out.num_predicted + (is_right & jnp.take(is_predicted, index, axis=1, mode="clip")),
            )
            return all_rows, out, num_tokens + going, is_right & all_rows.active[: self.num_rows], index + 1

        start = (state.rows, out, carry.num_tokens, rows.active, jnp.int32(0))
        all_rows, out, num_tokens, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[3]), draw, start)
        own = self._own(all_rows)
        waits = is_masked & own.active & ~keeps_to(paths, num_tokens, own.last_token)
        all_rows = all_rows._replace(active=all_rows.active.at[:num_rows].set(own.active & ~waits))
        if self.draft is not None:
            is_asked = jnp.any((drafts.suffix == BY_MODEL) & (drafts.num > 0))
            acceptance = jnp.where(is_asked, own.acceptance, recovered(own.acceptance))
            all_rows = all_rows._replace(
                draft_length=all_rows.draft_length.at[:num_rows].set(jnp.minimum(draft_length, own.length)),
                acceptance=all_rows.acceptance.at[:num_rows].set(acceptance),
            )
        return _Carry(state._replace(pool=pool, rows=all_rows), out, num_tokens, carry.waits | waits, logits)

    def _find_drafts(
        self,
        rows: RowState,
        paths: Paths,
        num_tokens: Int[Array, " rows"],
        room: Int[Array, " rows"],
        num_drafts: int,
        limits: Drafting,
    ) -> Ahead:
        """What is found in the rows' own text or is on their paths, at most `room` tokens of each."""
        drafts = look_up(rows.history, rows.history_start, rows.history_start + rows.length, num_drafts)
        drafts = drafts._replace(num=jnp.where(limits.looks_up, drafts.num, 0))
        ahead = look_ahead(paths, num_tokens, rows.sampling.is_masked, drafts, rows.acceptance)
        forced = jnp.where(limits.model_cost > 0, num_drafts, 0)  # any tokens, to be timed
        num = jnp.where(jnp.isinf(limits.costs[0]), forced, ahead.drafts.num)
        return ahead._replace(drafts=ahead.drafts._replace(num=jnp.minimum(num, room)))

    def _choose_drafts(
        self, state: DecodeState, ahead: Ahead, room: Int[Array, " rows"], limits: Drafting, size: int
    ) -> _Verified:
        """How many of the drafts that were found are verified, and whether the draft model makes those that are not."""
        rows, costs, drafts = self._own(state.rows), limits.costs, ahead.drafts
        found = rates(drafts, ahead.chances, rows.active, costs, size)
        if self.draft is None:
            depth = jnp.argmax(found)
            num = jnp.minimum(drafts.num, depth) if self.platform.programs_agree else drafts.num
            return _Verified(ahead, num, depth, state.draft_pool, rows.draft_length)
        is_open = rows.active & (drafts.num == 0) & ~rows.sampling.is_masked
        drafts = drafts._replace(
            num=jnp.where(is_open, jnp.clip(room, 0, limits.max_by_model), drafts.num),
            suffix=jnp.where(is_open, BY_MODEL, drafts.suffix),
        )
        likely = jnp.where(is_open[:, None], chances(drafts, rows.acceptance), ahead.chances)
        made = rates(drafts, likely, rows.active, costs + limits.model_cost * jnp.arange(costs.shape[0]), size)
        is_asked = jnp.max(made) > jnp.max(found)
        depth = jnp.where(is_asked, jnp.argmax(made), jnp.argmax(found))
        by_model = jnp.where(is_asked & is_open, jnp.minimum(drafts.num, depth), 0)
        tokens, pool, length = draft_tokens(self.draft, state, by_model, drafts.tokens.shape[1], self.once)
        drafts = drafts._replace(
            tokens=jnp.where(is_open[:, None], tokens, drafts.tokens), num=jnp.where(is_open, by_model, drafts.num)
        )
        num = jnp.minimum(drafts.num, depth) if self.platform.programs_agree else drafts.num
        ahead = Ahead(drafts, likely, ahead.is_predicted & ~is_open[:, None])
        return _Verified(ahead, num, depth, pool, length)

    def _either(
        self,
        state: DecodeState,
        logits: Float[Array, "tokens vocab"],
        drafts: Drafts,
        num: Int[Array, " rows"],
        verifies: Bool[Array, ""],
    ) -> tuple[Float[Array, "tokens vocab"], Int[Array, " rows"], KVPool]:
        """`_forward_drafts` if it `verifies`, else the same of a plain step."""
        size = logits.shape[0]

        def plain(carry: _Ran) -> _Ran:
            done, logits, _, pool = carry
            own, pool = self._forward(state, pool)
            logits = jax.lax.dynamic_update_slice_in_dim(logits, own, 0, axis=0)
            return done + 1, logits, jnp.arange(self.num_rows), pool

        def verify(carry: _Ran) -> _Ran:
            return carry[0] + 1, *self._forward_drafts(state, carry[3], drafts, num, size)

        # One of two loops of one round, and not a branch: what passes through a branch is copied there, the pool too.
        done, first = verifies.astype(jnp.int32), jnp.zeros(self.num_rows, jnp.int32)
        carry = jax.lax.while_loop(lambda carry: carry[0] < self.once, plain, (done, logits, first, state.pool))
        carry = (1 - done, *carry[1:])
        _, logits, first, pool = jax.lax.while_loop(lambda carry: carry[0] < self.once, verify, carry)
        return logits, first, pool

    def _forward(self, state: DecodeState, pool: KVPool) -> tuple[Float[Array, "rows vocab"], KVPool]:
        state, steers, platform = state._replace(pool=pool), self.steers, self.platform
        return next_logits(self.model, state, self.once, self.num_rows, steers=steers, platform=platform)

    def _forward_drafts(
        self, state: DecodeState, pool: KVPool, drafts: Drafts, num: Int[Array, " rows"], size: int
    ) -> tuple[Float[Array, "tokens vocab"], Int[Array, " rows"], KVPool]:
        """Logits after each active row's last token and `num` drafts, `size` in all, row by row, and where each row's
        begin."""
        rows = self._own(state.rows)
        num_tokens = jnp.where(rows.active, 1 + num, 0)

        def attend(q: Queries, kv: NewKV, pool: KVPool, pages: Pages, window: int | None) -> tuple[Queries, KVPool]:
            return self.platform.attention.verify(q, kv, pool, pages, rows.length, num_tokens, window)

        tokens = jnp.concatenate((rows.last_token[:, None], drafts.tokens), axis=1)
        places = jnp.arange(tokens.shape[1])
        positions = rows.length[:, None] + jnp.minimum(places, num[:, None])
        page_table = state.page_table[: self.num_rows]
        steer = partial(steered, rows.steering) if self.steers else None
        hidden, pool = self.model(tokens, positions, pool, page_table, attend, self.once, num_tokens, steer)
        # The head is a fifth of a small model: it takes what is drawn from alone.
        is_real = (places < num_tokens[:, None]).ravel()
        (chosen,) = jnp.nonzero(is_real, size=size, fill_value=0)
        logits = self.model.logits(hidden.reshape(-1, hidden.shape[-1])[chosen], jnp.sum(num_tokens))
        return logits, jnp.cumsum(num_tokens) - num_tokens, pool

    def _emit(
        self,
        all_rows: RowState,
        out: StepOutput,
        logits: Float[Array, "rows vocab"],
        offered: Float[Array, "rows vocab"],
        going: Bool[Array, " rows"],
        at: Int[Array, "*rows"],
    ) -> tuple[RowState, StepOutput, Int[Array, " rows"]]:
        """Draws the next token of the rows that are `going`, and writes it to its place `at` of the output.

        It is drawn from what is `offered`; log-probabilities are those of `logits`.
        """
        some, rows = slice(0, self.num_rows), self._own(all_rows)
        sampling = rows.sampling
        tokens, is_finite = sample(
            offered,
            sampling,
            generated_counts=rows.generated_counts,
            prompt_mask=rows.prompt_mask,
            suppress_stops=rows.min_remaining > 0,
            positions=rows.length + 1,
            active=going,
            # Plain steps have one mask, for the dispatch's only one.
            mask_index=at if at.ndim else jnp.zeros_like(rows.length),
        )
        logprobs = top_logprobs(logits, tokens, jnp.any(going & (sampling.num_logprobs >= 0)))
        is_stop = jnp.any(tokens[:, None] == sampling.stop_ids, axis=1)
        ends = is_stop | (rows.remaining <= 1) | ~is_finite
        emitted = going & is_finite

        def put(
            array: Shaped[Array, "steps rows ..."], new: Shaped[Array, "rows ..."]
        ) -> Shaped[Array, "steps rows ..."]:
            if not at.ndim:
                return array.at[at].set(new)
            places = jnp.where(going, at, MAX_STEPS)
            return array.at[places, jnp.arange(self.num_rows)].set(new, mode="drop")

        out = out._replace(
            tokens=put(out.tokens, jnp.where(going, jnp.where(is_finite, tokens, NOT_FINITE), -1)),
            logprobs=put(out.logprobs, logprobs.chosen),
            top_ids=put(out.top_ids, logprobs.ids),
            top_logprobs=put(out.top_logprobs, logprobs.values),
        )
        index = jnp.arange(self.num_rows)
        history = all_rows.history
        if history.shape[1]:
            places = jnp.where(emitted, rows.history_start + rows.length + 1, history.shape[1])
            history = history.at[index, places].set(tokens, mode="drop")
        new_rows = all_rows._replace(
            length=all_rows.length.at[some].add(going),
            last_token=all_rows.last_token.at[some].set(jnp.where(emitted, tokens, rows.last_token)),
            remaining=all_rows.remaining.at[some].add(-emitted.astype(jnp.int32)),
            min_remaining=all_rows.min_remaining.at[some].add(-(emitted & (rows.min_remaining > 0)).astype(jnp.int32)),
            active=all_rows.active.at[some].set(rows.active & ~(going & ends)),
            generated_counts=all_rows.generated_counts.at[index, tokens].add(emitted.astype(jnp.int32)),
            history=history,
        )
        return new_rows, out, tokens

    def _own(self, rows: RowState) -> RowState:
        own: RowState = jax.tree.map(lambda x: x[: self.num_rows], rows)
        return own
