"""Decoding as pure functions over a state: nothing hidden, no thread, every call jitted or to be jitted.

>>> model = functional.Model.of(llama)
>>> decoding = functional.start(model, [llama.tokenizer.encode("The sea")], SamplingParams(temperature=0.8, seed=1))
>>> decoding = functional.steps(model, decoding, 20)
>>> llama.tokenizer.decode(functional.tokens(decoding, 0))

The engine runs the same programs. Here each row has pages of its own, so that a row can be copied and taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from jaxllama.decode.params import SamplingParams
from jaxllama.decode.prompts import read_params, token_ids
from jaxllama.decode.state import (
    MAX_STEPS,
    Chunk,
    DecodeState,
    Place,
    insert,
    make_state,
    row_state,
    state_shapes,
    state_shardings,
)
from jaxllama.decode.steps import LogitsProcessor, decode_steps, next_logits, prefill
from jaxllama.errors import ConfigError, ContextLengthError, RequestError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.forward import Transformer
from jaxllama.model.params import Params
from jaxllama.model.platforms.platform import Platform

__all__ = ["Decoding", "Model", "advance", "fork", "push", "rewind", "set_params", "start", "steps", "tokens"]


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "platform", "mesh"])
@dataclass(frozen=True)
class Model:
    """The weights and what is static about a model; an argument of jitted functions like any other."""

    config: LlamaConfig
    params: Params
    platform: Platform
    mesh: Mesh

    @classmethod
    def of(cls, llama: Any) -> Model:
        """That of a loaded `Llama`. The engine is not used.

        Raises: ConfigError where rows lie on several shards of a mesh.
        """
        if llama.engine.platform.num_shards > 1:
            raise ConfigError(
                "functional decoding is for rows on one shard: a mesh with data=1 and tp up to the KV heads"
            )
        return cls(llama.config, llama.params, llama.engine.platform, llama.mesh)


class Decoding(NamedTuple):
    """The rows' state and their tokens, prompts included: those of row r are `tokens[r, :state.rows.length[r] + 1]`."""

    state: DecodeState
    tokens: Int[Array, "rows context"]


def start(
    model: Model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_context: int = 512,
) -> Decoding:
    """Rows that are about to continue `prompts` (token ids), whose keys and values are computed here.

    `params` are those of all rows, or one for each; a seed of None is 0. `max_context` is how many tokens a row can
    have, in all.

    Raises: RequestError for prompts or parameters that cannot run, ContextLengthError for a prompt that fills the
        context.
    """
    given = [token_ids(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    each = read_params(params, len(given))
    for i, ids in enumerate(given):
        if not ids or not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
            raise RequestError(
                f"prompt {i} must be ids from 0 to {model.config.vocab_size - 1}, at least one", "prompts"
            )
        if len(ids) >= max_context:
            raise ContextLengthError(f"prompt {i} has {len(ids)} tokens, and a row holds {max_context}", "prompts")
    platform, num_rows = model.platform, max(len(given), model.platform.min_rows)
    chunk, page_size = min(platform.chunk_sizes), platform.page_size
    pages_per_row = -(-(max_context + chunk) // page_size)
    shapes = state_shapes(
        model.config,
        num_rows=num_rows,
        num_pages=1 + num_rows * pages_per_row,
        page_size=page_size,
        max_context=pages_per_row * page_size,
        dtype=model.params["norm"].dtype,
        layout=platform.head_layout,
    )
    shardings = state_shardings(model.config, model.mesh, shapes)
    state = make_state(shapes, shardings)
    table = 1 + np.arange(num_rows * pages_per_row, dtype=np.int32).reshape(num_rows, pages_per_row)
    state = state._replace(page_table=jax.device_put(table, shardings.page_table))
    history = np.zeros((num_rows, max_context), np.int32)
    for row, (ids, one) in enumerate(zip(given, each, strict=True)):
        one.validate_vocab(model.config.vocab_size)
        history[row, : len(ids)] = ids
        pool = state.pool
        for first in range(0, len(ids) - 1, chunk):
            part = np.array(ids[first : min(first + chunk, len(ids) - 1)], np.int32)
            at = Chunk(np.pad(part, (0, chunk - len(part))), np.int32(first), np.int32(len(part)))
            pool = prefill(model.config, model.params, pool, Place(table[row], np.int32(0)), at, platform=platform)
        state = insert(state._replace(pool=pool), np.int32(row), _row(model, one, ids, [], max_context))
    return Decoding(state, jnp.asarray(history))


def steps(
    model: Model,
    decoding: Decoding,
    num_steps: int | Int[Any, ""] = 1,
    *,
    logits_processor: LogitsProcessor | None = None,
    steers: bool = False,
) -> Decoding:
    """Draws up to `num_steps` (at most 32) tokens for each active row, without coming back to the host.

    `logits_processor(logits, state) -> logits` is compiled into the loop. With `steers` rows are steered as their
    parameters say. The state that was given is used up.
    """
    num_rows = decoding.tokens.shape[0]
    before = decoding.state.rows.length + 0  # a copy: the state is donated
    state, out = decode_steps(
        model.config,
        model.params,
        decoding.state,
        jnp.minimum(jnp.asarray(num_steps, jnp.int32), MAX_STEPS),
        jnp.ones(num_rows, jnp.bool_),
        num_rows=num_rows,
        steers=steers,
        logits_processor=logits_processor,
        platform=model.platform,
    )
    return Decoding(state, _appended(decoding.tokens, before, out.tokens))


@jax.jit
def advance(model: Model, decoding: Decoding) -> tuple[Decoding, Float[Array, "rows vocab"]]:
    """The logits of every active row's next token, which `push` then chooses. Rows are one token longer until then."""
    num_rows, state = decoding.tokens.shape[0], decoding.state
    transformer = Transformer(model.config, model.params, model.platform)
    once = jnp.minimum(jnp.max(state.rows.length) + 1, 1)
    logits, pool = next_logits(transformer, state, once, num_rows, platform=model.platform)
    rows = state.rows._replace(length=state.rows.length + state.rows.active)
    return decoding._replace(state=state._replace(pool=pool, rows=rows)), logits


@jax.jit
def push(decoding: Decoding, chosen: Int[Array, " rows"]) -> Decoding:
    """Gives each active row the token that it goes on with after `advance`."""
    rows = decoding.state.rows
    index, is_on = jnp.arange(len(chosen)), rows.active
    places = jnp.where(is_on, rows.length, decoding.tokens.shape[1])
    rows = rows._replace(
        last_token=jnp.where(is_on, chosen, rows.last_token),
        remaining=rows.remaining - is_on,
        active=is_on & (rows.remaining > 1),
        generated_counts=rows.generated_counts.at[index, chosen].add(is_on.astype(jnp.int32)),
    )
    return Decoding(decoding.state._replace(rows=rows), decoding.tokens.at[index, places].set(chosen, mode="drop"))


@partial(jax.jit, static_argnames="num_layers")
def _forked(decoding: Decoding, sources: Int[Array, " rows"], num_layers: int) -> Decoding:
    state, (num_rows, pages_per_row) = decoding.state, decoding.state.page_table.shape

    def copied(part: Shaped[Array, "pages ..."]) -> Shaped[Array, "pages ..."]:
        layers = part.reshape(num_layers, -1, *part.shape[1:])
        own = layers[:, 1:].reshape(num_layers, num_rows, pages_per_row, *part.shape[1:])
        own = own[:, sources].reshape(num_layers, -1, *part.shape[1:])
        return jnp.concatenate((layers[:, :1], own), axis=1).reshape(part.shape)

    rows = jax.tree.map(lambda x: x[sources], state.rows)
    return Decoding(state._replace(pool=jax.tree.map(copied, state.pool), rows=rows), decoding.tokens[sources])


def fork(model: Model, decoding: Decoding, sources: Sequence[int] | Int[Array, " rows"]) -> Decoding:
    """Row i becomes a copy of row `sources[i]`, its parameters and seed included. The old state stays as it is."""
    return _forked(decoding, jnp.asarray(sources, jnp.int32), model.config.num_layers)


@jax.jit
def rewind(decoding: Decoding, row: Int[Any, ""], num_tokens: Int[Any, ""]) -> Decoding:
    """Takes the last `num_tokens` generated tokens of a row back; it is active again. The old state stays as it is."""
    rows = decoding.state.rows
    length = rows.length[row] - num_tokens
    own, places = decoding.tokens[row], jnp.arange(decoding.tokens.shape[1])
    dropped = ((places > length) & (places <= rows.length[row])).astype(jnp.int32)
    rows = rows._replace(
        length=rows.length.at[row].set(length),
        last_token=rows.last_token.at[row].set(own[length]),
        remaining=rows.remaining.at[row].add(num_tokens),
        active=rows.active.at[row].set(True),
        generated_counts=rows.generated_counts.at[row, own].add(-dropped),
    )
    return decoding._replace(state=decoding.state._replace(rows=rows))


def set_params(model: Model, decoding: Decoding, row: int, params: SamplingParams) -> Decoding:
    """Goes on with other parameters in `row`: its seed, penalties and budget too. The state that was given is used up.

    Raises: RequestError for ids outside the vocabulary.
    """
    params.validate_vocab(model.config.vocab_size)
    ids = tokens(decoding, row)
    counts = np.asarray(decoding.state.rows.generated_counts[row])
    num_generated = int(counts.sum())
    cut = len(ids) - num_generated
    new = _row(model, params, ids[:cut], ids[cut:], decoding.tokens.shape[1])
    return decoding._replace(state=insert(decoding.state, np.int32(row), new))


def tokens(decoding: Decoding, row: int) -> list[int]:
    """The ids of a row, prompt and stop token included."""
    found: list[int] = np.asarray(decoding.tokens[row, : int(decoding.state.rows.length[row]) + 1]).tolist()
    return found


def _row(model: Model, params: SamplingParams, prompt: list[int], generated: list[int], max_context: int) -> Any:
    room = max_context - len(prompt) - len(generated)
    budget = room if params.max_tokens is None else min(room, params.max_tokens - len(generated))
    return row_state(
        model.config,
        params,
        prompt=prompt,
        generated=generated,
        remaining=budget,
        seed=params.seed or 0,
    )


@jax.jit
def _appended(
    history: Int[Array, "rows context"], before: Int[Array, " rows"], new: Int[Array, "steps rows"]
) -> Int[Array, "rows context"]:
    num_steps, num_rows = new.shape
    places = before + 1 + jnp.arange(num_steps)[:, None]
    places = jnp.where(new >= 0, places, history.shape[1])
    rows = jnp.broadcast_to(jnp.arange(num_rows), new.shape)
    return history.at[rows, places].set(new, mode="drop")
