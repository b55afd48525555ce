"""Drafts for the next tokens of rows: where they come from, and whether it pays to verify them.

A draft changes no token. `steps` runs the model over the drafts of all rows at once and keeps of each row's what its
own noise draws anyway; what is here decides about the time that takes, and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

SUFFIXES = (2, 3, 4)
"""Lengths of what must be found again, in tokens."""
BY_MODEL = len(SUFFIXES)
"""Stands for a suffix's index in `Drafts.suffix` where a draft model made the draft."""
FIRST_ACCEPTANCE = (0.25, 0.5, 0.75, 0.7)
"""What a new row is taken for, by the length of what is found, and of a draft model: the share of drafted tokens that
are accepted."""
_BLOCK = 1024
_WEIGHT = 1 / 8
"""Of the newest token in a row's acceptance: it follows the last eight or so."""
_RECOVERY = 1 / 256
"""Of the way back to its first acceptance that a draft model goes in a step in which nobody asks it: now and then it is
tried again, for about a hundredth of the time."""


class Paths(NamedTuple):
    """What masked rows are thought to say in a dispatch: `tokens[row, :num[row]]`, each with the chance that it is
    right if those before it are, and whether it was found in what the row was expected to resemble.

    The host has made the masks along it (`SamplingArrays.token_mask`), so a row may go on while it keeps to its path.
    NumPy's arrays on the host.
    """

    tokens: Int[Any, "rows drafts"]
    num: Int[Any, " rows"]
    chances: Float[Any, "rows drafts"]
    is_predicted: Bool[Any, "rows drafts"]

    @classmethod
    def none(cls, num_rows: int, num_drafts: int) -> Paths:
        """Those of rows that are not masked, or of which nothing is thought."""
        shape = num_rows, num_drafts
        zeros = np.zeros(shape, np.int32), np.zeros(num_rows, np.int32)
        return cls(*zeros, np.zeros(shape, np.float32), np.zeros(shape, np.bool_))


class Drafting(NamedTuple):
    """What a dispatch with drafts is told: the most tokens for a row, what steps cost (`rates`), and the paths of all
    rows.

    `looks_up`: drafts are found in rows' own text. A draft model makes at most `max_by_model` of a row, and a step of
    it costs `model_cost`. Where plain steps cost infinity, steps verify even where no drafts are found: any tokens, or
    where the draft model's cost nothing, those. NumPy's arrays on the host.
    """

    max_tokens: Int[Any, ""]
    costs: Float[Any, " depths"]
    paths: Paths
    looks_up: Bool[Any, ""] = np.bool_(True)
    max_by_model: Int[Any, ""] = np.int32(0)
    model_cost: Float[Any, ""] = np.float32(1)


class Drafts(NamedTuple):
    """`tokens[row, :num[row]]` are thought to follow a row's last token. `suffix` is the index in `SUFFIXES` of the
    length that was found, or `BY_MODEL`, and `is_predicted` says that it was before the row's own tokens; where `num`
    is 0 neither means anything."""

    tokens: Int[Array, "rows drafts"]
    num: Int[Array, " rows"]
    suffix: Int[Array, " rows"]
    is_predicted: Bool[Array, " rows"]


def look_up(
    history: Int[Array, "rows history"], start: Int[Array, " rows"], last: Int[Array, " rows"], num_drafts: int
) -> Drafts:
    """What followed the longest suffix of each row's tokens where it was there before, the newest such place first.

    A row's own tokens are `history[start] … history[last]`. What lies before `start` is a text that the row is expected
    to resemble; of equally long suffixes those there are preferred. A draft that reaches the row's end goes on with
    itself, as if the row repeated itself from there on.

    Source: Saxena 2023, "Prompt Lookup Decoding".
    """
    size, longest = history.shape[1], max(SUFFIXES)
    padded = jnp.pad(history, ((0, 0), (longest - 1, -size % _BLOCK)), constant_values=-1)
    wanted = [jnp.take_along_axis(history, jnp.maximum(last[:, None] - back, 0), axis=1) for back in range(longest)]

    def visit(block: Int[Array, ""], best: Int[Array, " rows"]) -> Int[Array, " rows"]:
        first = block * _BLOCK
        tokens = jax.lax.dynamic_slice_in_dim(padded, first, _BLOCK + longest - 1, axis=1)
        places = first + jnp.arange(_BLOCK)
        is_match, length = places < last[:, None], jnp.zeros((len(history), _BLOCK), jnp.int32)
        for back in range(longest):
            is_match &= (tokens[:, longest - 1 - back :][:, :_BLOCK] == wanted[back]) & (last[:, None] >= back)
            length += is_match
        order = places + jnp.where(places < start[:, None], size, 0)
        found = jnp.where(length >= min(SUFFIXES), length * (2 * size) + order, 0)
        return jnp.maximum(best, found.max(axis=1))

    # As far as any row has come: a context is mostly empty.
    best = jax.lax.fori_loop(0, last.max() // _BLOCK + 1, visit, jnp.zeros(len(history), jnp.int32))
    length, place = best // (2 * size), best % size
    following = jnp.arange(num_drafts) % jnp.maximum(last - place, 1)[:, None]
    tokens = jnp.take_along_axis(history, place[:, None] + 1 + following, axis=1)
    return Drafts(tokens, jnp.where(length > 0, num_drafts, 0), jnp.maximum(length - min(SUFFIXES), 0), place < start)


def chances(drafts: Drafts, acceptance: Float[Array, "rows suffixes"]) -> Float[Array, "rows depths"]:
    """How likely it is of each row that its first 0, 1, … drafts are all right."""
    each = jnp.take_along_axis(acceptance, drafts.suffix[:, None], axis=1)
    return each ** jnp.arange(1 + drafts.tokens.shape[1])


class Ahead(NamedTuple):
    """What a step knows of its drafts: besides them their `chances`, and whether each was predicted."""

    drafts: Drafts
    chances: Float[Array, "rows depths"]
    is_predicted: Bool[Array, "rows drafts"]


def look_ahead(
    paths: Paths,
    num_tokens: Int[Array, " rows"],
    is_masked: Bool[Array, " rows"],
    drafts: Drafts,
    acceptance: Float[Array, "rows suffixes"],
) -> Ahead:
    """The drafts that were looked up; of masked rows what is left of their paths after `num_tokens` tokens instead."""
    num_drafts = drafts.tokens.shape[1]
    places = jnp.minimum(num_tokens[:, None] + jnp.arange(num_drafts), num_drafts - 1)

    def left(array: Shaped[Array, "rows drafts"]) -> Shaped[Array, "rows drafts"]:
        return jnp.take_along_axis(jnp.asarray(array), places, axis=1)

    chosen = is_masked[:, None]
    likely = jnp.pad(jnp.cumprod(left(paths.chances), axis=1), ((0, 0), (1, 0)), constant_values=1)
    return Ahead(
        drafts._replace(
            tokens=jnp.where(chosen, left(paths.tokens), drafts.tokens),
            num=jnp.where(is_masked, jnp.maximum(paths.num - num_tokens, 0), drafts.num),
        ),
        jnp.where(chosen, likely, chances(drafts, acceptance)),
        jnp.where(chosen, left(paths.is_predicted), drafts.is_predicted[:, None]),
    )


def keeps_to(paths: Paths, num_tokens: Int[Array, " rows"], last_token: Int[Array, " rows"]) -> Bool[Array, " rows"]:
    """Whether rows are still on their paths after `num_tokens` tokens, of which all but the last were."""
    before = jnp.maximum(num_tokens - 1, 0)[:, None]
    expected = jnp.take_along_axis(jnp.asarray(paths.tokens), before, axis=1, mode="clip")[:, 0]
    return (num_tokens == 0) | ((num_tokens <= paths.num) & (last_token == expected))


def rates(
    drafts: Drafts,
    likely: Float[Array, "rows depths"],
    active: Bool[Array, " rows"],
    costs: Float[Array, " depths"],
    max_tokens: int,
) -> Float[Array, " depths"]:
    """The tokens expected in a time, by how many drafts a row are verified at most; 0 is a plain step.

    `costs[d]` is what a step takes that verifies up to d drafts a row, whatever the unit, and `likely` are the
    `chances`: of d drafts that are each accepted with probability a, a + a² + … + a^d are expected to be. All rows
    together verify at most `max_tokens`, their last ones included: -1 where there are more.
    """
    depths = jnp.arange(costs.shape[0])
    is_there = active[:, None] & (depths <= drafts.num[:, None])
    # At depth 0 it is 1: the token that every step gives.
    expected = jnp.cumsum(jnp.sum(jnp.where(is_there, likely, 0), axis=0))
    fits = jnp.cumsum(jnp.sum(is_there, axis=0)) <= max_tokens
    return jnp.where(fits | (depths == 0), expected / costs, -1)


def learned(
    acceptance: Float[Array, "rows suffixes"],
    suffix: Int[Array, " rows"],
    is_drafted: Bool[Array, " rows"],
    is_hit: Bool[Array, " rows"],
) -> Float[Array, "rows suffixes"]:
    """The acceptance after one more token of the rows that had a draft for it, verified or not."""
    is_own = is_drafted[:, None] & (jnp.arange(acceptance.shape[1]) == suffix[:, None])
    return jnp.where(is_own, acceptance + _WEIGHT * (is_hit[:, None] - acceptance), acceptance)


def recovered(acceptance: Float[Array, "rows suffixes"]) -> Float[Array, "rows suffixes"]:
    """The acceptance after a step in which the draft model was not asked."""
    own = acceptance[:, BY_MODEL]
    missing = jnp.maximum(FIRST_ACCEPTANCE[BY_MODEL] - own, 0)
    return acceptance.at[:, BY_MODEL].set(own + _RECOVERY * missing)
