"""Scores of given tokens: one pass over a prompt, chunk by chunk, beside the engine and without its cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllama.decode.sampling import top_logprobs
from jaxllama.decode.state import Chunk, Place, make_pool
from jaxllama.decode.steps import prefill_logits
from jaxllama.errors import NonFiniteLogitsError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params
from jaxllama.model.platforms.platform import Platform

_CHUNK = 128
_LEAST_CHUNKS = 8


@dataclass(frozen=True)
class PromptLogprob:
    """A prompt token's log-probability given those before it, and how many tokens are likelier, plus one (`rank`).

    `top` are the likeliest tokens at its place (id, log-probability), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


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
    pool = make_pool(config, mesh, num_pages=num_pages, page_size=page_size, dtype=kv_dtype)
    place = Place(np.arange(num_pages, dtype=np.int32), np.int32(0))
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        padded = np.pad(part, (0, chunk - len(part)))
        given = Chunk(padded, np.int32(start), np.int32(len(part)))
        scores, pool = prefill_logits(config, params, pool, place, given, platform=platform)
        yield scores


def prompt_logprobs(
    chunks: Iterator[Float[Array, "chunk vocab"]], tokens: Int[np.ndarray, " num_tokens"], num_top: int
) -> Iterator[PromptLogprob]:
    """What `logits_of` says of every token but the first. Only a few numbers a token leave the device.

    Raises: NonFiniteLogitsError.
    """
    start = 1
    for scores in chunks:
        size = min(scores.shape[0], len(tokens) - start)
        following = np.zeros(scores.shape[0], np.int32)
        following[:size] = tokens[start : start + size]
        chosen, rank, ids, values = (np.asarray(part) for part in _summarise(scores, following))
        if not np.isfinite(chosen[:size]).all():
            raise NonFiniteLogitsError("the model produced NaN or infinity for this prompt")
        for i in range(size):
            top = zip(ids[i, :num_top].tolist(), values[i, :num_top].tolist(), strict=True)
            yield PromptLogprob(int(following[i]), float(chosen[i]), int(rank[i]), tuple(top))
        start += size


@jax.jit
def _summarise(
    scores: Float[Array, "chunk vocab"], tokens: Int[Array, " chunk"]
) -> tuple[Float[Array, " chunk"], Int[Array, " chunk"], Int[Array, "chunk 20"], Float[Array, "chunk 20"]]:
    found = top_logprobs(scores, tokens, jnp.bool_(True))
    own = jnp.take_along_axis(scores, tokens[:, None], axis=1)
    return found.chosen, 1 + jnp.sum(scores > own, axis=1), found.ids, found.values
