"""Scores of given tokens: a prefill that also says how likely each token was, and logits beside the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllama.decode.params import MAX_TOP_LOGPROBS
from jaxllama.decode.sampling import argmax, top_logprobs
from jaxllama.decode.state import Chunk, Place, make_pool
from jaxllama.decode.steps import forward_chunk, prefill_logits
from jaxllama.model.cache import KVPool
from jaxllama.model.config import LlamaConfig
from jaxllama.model.forward import Transformer
from jaxllama.model.params import Params
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.platforms.program import program

_CHUNK = 128
_LEAST_CHUNKS = 8
_HEAD_BLOCK = 128
"""Positions whose logits are held at a time: 64 MB of a vocabulary of 128,000."""
_SKIPPING_HEAD_BLOCK = 32
"""The same where the head's product skips what is not asked for: what follows it does not."""


class Targets(NamedTuple):
    """What to score of a chunk: `tokens[i]` follows the chunk's token i. Of places before `first` nothing is said.

    `num_top` of the likeliest tokens are wanted at each place; NumPy's arrays on the host, as in `Chunk`.
    """

    tokens: Int[Any, " chunk"]
    first: Int[Any, ""]
    num_top: Int[Any, ""]


class Scores(NamedTuple):
    """Of each place of a chunk: its target's log-probability and rank (1: none is likelier), and the likeliest tokens.

    The first of `top_ids` is always the likeliest; the others are there where more than one was wanted. Places before
    `Targets.first` and past the chunk's tokens mean nothing.
    """

    logprobs: Float[Array, " chunk"]
    ranks: Int[Array, " chunk"]
    top_ids: Int[Array, "chunk 20"]
    top_logprobs: Float[Array, "chunk 20"]


@program("pool", static_argnames=("config",), result=lambda pool: (pool, None))
def prefill_scores(
    config: LlamaConfig,
    params: Params,
    pool: KVPool,
    place: Place,
    chunk: Chunk,
    targets: Targets,
    *,
    platform: Platform = PLAIN,
) -> tuple[KVPool, Scores]:
    """`prefill` that also scores `targets`. The head runs for the places that are asked for, a block at a time."""
    hidden, pool = forward_chunk(config, params, pool, place, chunk, platform)
    model = Transformer(config, params, platform)
    size = hidden.shape[0]
    block = min(_SKIPPING_HEAD_BLOCK if platform.has_layer_kernel else _HEAD_BLOCK, size)
    width = min(MAX_TOP_LOGPROBS, config.vocab_size)
    scores = Scores(
        jnp.zeros(size), jnp.zeros(size, jnp.int32), jnp.zeros((size, width), jnp.int32), jnp.zeros((size, width))
    )

    num_scored = jnp.maximum(chunk.num_tokens - targets.first, 0)

    def score(index: Int[Array, ""], scores: Scores) -> Scores:
        places = targets.first + index * block + jnp.arange(block)
        part, tokens = (jnp.take(x, places, axis=0, mode="clip") for x in (hidden, targets.tokens))
        found = _score(model.logits(part, jnp.minimum(num_scored - index * block, block)), tokens, targets.num_top)
        scores = jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), scores, found)
        return scores

    return pool, jax.lax.fori_loop(0, -(-num_scored // block), score, scores)


def _score(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"], num_top: Int[Array, ""]) -> Scores:
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    normaliser = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    best = argmax(logits)[:, None]
    best_logprob = jnp.take_along_axis(logits, best, axis=1) - normaliser
    # A sort of the vocabulary, which most callers do not need.
    top = top_logprobs(logits, tokens, num_top > 1)
    is_first = jnp.arange(top.ids.shape[1]) == 0
    return Scores(
        (own - normaliser)[:, 0],
        1 + jnp.sum(logits > own, axis=1),
        jnp.where(is_first, best, top.ids),
        jnp.where(is_first, best_logprob, top.values),
    )


def logits_of(
    config: LlamaConfig,
    params: Params,
    mesh: Mesh,
    tokens: Int[np.ndarray, " num_tokens"],
    *,
    page_size: int,
    kv_dtype: Any,
    platform: Platform,
) -> Iterator[Float[Array, "chunk vocab"]]:
    """The logits after each token, in chunks of one size on the device; the last is padded.

    The programs are few: the short-lived cache has `_LEAST_CHUNKS`, or a power of two, or holds the model's context.
    """
    chunk = -(-_CHUNK // page_size) * page_size
    num_chunks = max(_LEAST_CHUNKS, 1 << (-(-len(tokens) // chunk) - 1).bit_length())
    num_chunks = min(num_chunks, -(-config.max_position_embeddings // chunk))
    num_pages = num_chunks * chunk // page_size
    sizes = {"num_pages": num_pages, "page_size": page_size}
    pool = make_pool(config, mesh, **sizes, dtype=kv_dtype, layout=platform.head_layout)
    place = Place(np.arange(num_pages, dtype=np.int32), np.int32(0))
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        padded = np.pad(part, (0, chunk - len(part)))
        given = Chunk(padded, np.int32(start), np.int32(len(part)))
        scores, pool = prefill_logits(config, params, pool, place, given, platform=platform)
        yield scores
