"""The filters and the draw, on the device: what `SamplingParams` asks of each row."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from jaxllama.decode.params import CONTROLS, MAX_TOP_LOGPROBS

_DRAW_BLOCK = 128
_INFINITY_BITS = 0x7F800000

if TYPE_CHECKING:

    class ControlArrays(tuple[Array, ...]):
        """What it is below, to a type checker: the names are not written twice."""

        def __getattr__(self, name: str) -> Array: ...

else:
    ControlArrays = namedtuple("ControlArrays", [name for name, control in CONTROLS.items() if control.dtype])
    ControlArrays.__doc__ = "The controls that are a number of every row, `[rows]` each."


class SamplingArrays(NamedTuple):
    """What the device needs of every row's `SamplingParams`: always arrays, so that no value recompiles anything.

    `stop_ids` is padded with -1. `logit_bias` is dense: adding it is elementwise over a sharded vocabulary, a scatter
    of ids is not; `is_biased` spares reading it. `num_logprobs` is -1 where none are asked for. Where `is_masked`, only
    the tokens whose bits are set in `token_mask` (bit i % 32 of word i // 32 for token i) may come; there is one for
    each of the row's next tokens, as far as those are foreseen.
    """

    controls: ControlArrays
    seed: UInt32[Array, "rows 2"]
    stop_ids: Int[Array, "rows max_stop_ids"]
    logit_bias: Float[Array, "rows vocab"]
    is_biased: Bool[Array, " rows"]
    num_logprobs: Int[Array, " rows"]
    is_masked: Bool[Array, " rows"]
    token_mask: UInt32[Array, "rows masks words"]


def apply_penalties(
    logits: Float[Array, "rows vocab"],
    controls: ControlArrays,
    generated_counts: Int[Array, "rows vocab"],
    prompt_mask: Bool[Array, "rows vocab"],
) -> Float[Array, "rows vocab"]:
    """Repetition penalty over prompt and output, then frequency and presence penalties over the output.

    A row whose penalties are neutral keeps its logits bit for bit.

    Source: Keskar et al. 2019, arXiv:1909.05858; OpenAI's API reference for the other two.
    """
    generated = generated_counts > 0
    repetition = jnp.where(prompt_mask | generated, controls.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - controls.frequency_penalty[:, None] * generated_counts.astype(logits.dtype)
    return logits - controls.presence_penalty[:, None] * generated.astype(logits.dtype)


PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


def suppress_stop_ids(
    logits: Float[Array, "rows vocab"], stop_ids: Int[Array, "rows max_stop_ids"], suppress: Bool[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Minus infinity at the stop ids of the rows that may not stop yet."""
    ids = jnp.where(suppress[:, None] & (stop_ids >= 0), stop_ids, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def apply_token_mask(
    logits: Float[Array, "rows vocab"], token_mask: UInt32[Array, "rows words"], is_masked: Bool[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Minus infinity at the tokens that the masked rows may not sample; the other rows keep their logits."""
    words = jnp.repeat(token_mask, 32, axis=1)[:, : logits.shape[1]]
    bits = words >> (jax.lax.broadcasted_iota(jnp.uint32, words.shape, 1) % 32) & 1
    return jnp.where(is_masked[:, None] & (bits == 0), -jnp.inf, logits)


def _own_mask(token_mask: UInt32[Array, "rows masks words"], index: Int[Array, " rows"]) -> UInt32[Array, "rows words"]:
    if token_mask.shape[1] == 1:
        return token_mask[:, 0]
    return jnp.take_along_axis(token_mask, index[:, None, None], axis=1, mode="clip")[:, 0]


def keep_top_k(logits: Float[Array, "rows vocab"], top_k: Int[Array, " rows"]) -> Float[Array, "rows vocab"]:
    """Masks what is below the `top_k`-th largest logit; ties with it stay. 0 or less keeps everything.

    Source: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    is_off = (top_k <= 0) | (top_k >= logits.shape[1])
    threshold = _largest_threshold(logits, lambda kept: jnp.sum(kept, axis=1) >= top_k)
    return jnp.where(is_off[:, None] | (logits >= threshold), logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "rows vocab"], top_p: Float[Array, " rows"]) -> Float[Array, "rows vocab"]:
    """Masks what is outside the smallest set of likeliest tokens whose probability reaches `top_p`; ties stay.

    The likeliest token always survives. Expects logits already divided by the temperature.

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    enough = top_p * weights.sum(axis=1)
    threshold = _largest_threshold(logits, lambda kept: jnp.sum(jnp.where(kept, weights, 0), axis=1) >= enough)
    return jnp.where((top_p >= 1)[:, None] | (logits >= threshold), logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "rows vocab"], min_p: Float[Array, " rows"]) -> Float[Array, "rows vocab"]:
    """Masks tokens less than `min_p` times as likely as the likeliest one.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    threshold = logits.max(axis=1) + jnp.log(min_p)
    # At min_p = 1 rounding must not cost the likeliest token its place.
    threshold = jnp.minimum(threshold, logits.max(axis=1))
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


FILTERS: dict[str, Callable[[Array, Array], Array]] = {
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
}
"""By the control that asks for it, in their order: what keeps some tokens' logits and masks the others."""


def _largest_threshold(
    logits: Float[Array, "rows vocab"], is_enough: Callable[[Bool[Array, "rows vocab"]], Bool[Array, " rows"]]
) -> Float[Array, "rows 1"]:
    """The largest logit t of each row for which `is_enough(logits >= t)`, by bisection on the bits of float32.

    32 passes over the vocabulary, each a reduction: no sort, and nothing is gathered when the vocabulary is sharded.
    """
    keys = _ordered_bits(logits)

    def halve(
        _: Any, bounds: tuple[UInt32[Array, " rows"], UInt32[Array, " rows"]]
    ) -> tuple[UInt32[Array, " rows"], UInt32[Array, " rows"]]:
        low, high = bounds
        middle = low + (high - low) // 2 + (high - low) % 2
        enough = is_enough(keys >= middle[:, None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    start = (jnp.zeros(logits.shape[0], jnp.uint32), keys.max(axis=1))
    low, _ = jax.lax.fori_loop(0, 32, halve, start)
    # The threshold need not be a logit of the row: round it up to the next one that is kept.
    return jnp.min(jnp.where(keys >= low[:, None], logits, jnp.inf), axis=1, keepdims=True)


def _ordered_bits(x: Float[Array, "rows vocab"]) -> UInt32[Array, "rows vocab"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def argmax(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """The first of the largest; some token where there is NaN."""
    ids: Array = jax.lax.platform_dependent(logits, tpu=argmax_of_pairs, default=argmax_in_two)
    return ids


def argmax_of_pairs(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """`argmax` on a TPU, in one reduction that reads the logits once: of pairs of a logit and its token."""

    def larger(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
        (x, i), (y, j) = a, b
        is_first = (x > y) | ((x == y) & (i < j))
        return jnp.where(is_first, x, y), jnp.where(is_first, i, j)

    last = logits.shape[1] - 1
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    start = (jnp.array(-jnp.inf, logits.dtype), jnp.int32(last))
    largest, first = jax.lax.reduce((logits, ids), start, larger, (1,))
    # Were nobody to look at the largest, XLA would put it out in bfloat16.
    return jnp.where(jnp.isnan(largest), last, first)


def argmax_in_two(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """`argmax` elsewhere: two plain reductions, which a CPU's XLA vectorises where it does not `jnp.argmax`."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_largest = logits == logits.max(axis=1, keepdims=True)
    return jnp.min(jnp.where(is_largest, ids, logits.shape[1] - 1), axis=1)


def draw(
    logits: Float[Array, "rows vocab"], seed: UInt32[Array, "rows 2"], positions: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    """Draws a token of each row from softmax(logits), by `fold_in(key(seed), position)` alone.

    Two uniforms: one chooses a block of 128 tokens by its mass, the other a token in it. So probabilities down to
    2^-48 can be drawn with 24-bit uniforms, and only block masses leave a device when the vocabulary is sharded.
    """
    rows, vocab = logits.shape
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % _DRAW_BLOCK))).reshape(rows, -1, _DRAW_BLOCK)
    uniforms = jax.vmap(_uniforms)(seed, positions)
    block = _choose(weights.sum(axis=2), uniforms[:, 0])
    within = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * _DRAW_BLOCK + _choose(within, uniforms[:, 1])


def _uniforms(seed: UInt32[Array, " 2"], position: Int[Array, ""]) -> Float[Array, " 2"]:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, position), (2,))


def _choose(weights: Float[Array, "rows n"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The index where the cumulated weights pass `uniform` of their total; never one of weight 0."""
    # A parallel cumulated sum is rounded differently at each index: it may rise or fall where the weight is 0.
    cumulated = jnp.where(weights > 0, jnp.cumsum(weights, axis=1), 0)
    target = uniform * cumulated.max(axis=1)
    ids = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    return jnp.min(jnp.where(cumulated > target[:, None], ids, weights.shape[1] - 1), axis=1)


class Sampled(NamedTuple):
    """`tokens` [rows]; `is_finite` [rows] is false where the logits hold NaN or +infinity."""

    tokens: Int[Array, " rows"]
    is_finite: Bool[Array, " rows"]


def sample(
    logits: Float[Array, "rows vocab"],
    sampling: SamplingArrays,
    *,
    generated_counts: Int[Array, "rows vocab"],
    prompt_mask: Bool[Array, "rows vocab"],
    suppress_stops: Bool[Array, " rows"],
    positions: Int[Array, " rows"],
    active: Bool[Array, " rows"],
    mask_index: Int[Array, " rows"],
) -> Sampled:
    """One token a row: bias, penalties, min_tokens or mask, temperature, top-k, top-p, min-p, draw.

    Greedy at temperature 0. Work that no active row asks for is skipped, and a row that does not ask for it is not
    changed by it in any bit.
    `positions` are those of the tokens being drawn, `mask_index` says which of its masks holds for each row.
    """
    # As integers, because the largest of floats may pass over NaN; and one reduction is one exchange between devices.
    magnitudes = jax.lax.bitcast_convert_type(logits, jnp.int32) & 0x7FFFFFFF
    is_finite = magnitudes.max(axis=1) < _INFINITY_BITS
    s, controls = sampling, sampling.controls
    penalised = active & functools.reduce(jnp.logical_or, [_is_on(controls, name) for name in PENALTIES])
    biased = active & s.is_biased
    # Whoever makes a mask has thought of min_tokens.
    suppressed = active & suppress_stops & ~s.is_masked
    masked = active & s.is_masked
    drawn = active & (controls.temperature > 0)

    def choose(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
        logits = _when(biased, lambda x: x + s.logit_bias, logits)
        logits = _when(penalised, lambda x: apply_penalties(x, controls, generated_counts, prompt_mask), logits)
        logits = _when(suppressed, lambda x: suppress_stop_ids(x, s.stop_ids, suppressed), logits)
        logits = _when(masked, lambda x: apply_token_mask(x, _own_mask(s.token_mask, mask_index), masked), logits)
        return jax.lax.cond(
            jnp.any(drawn),
            lambda x: jnp.where(controls.temperature > 0, _filter_and_draw(x, s, positions, drawn), argmax(x)),
            argmax,
            logits,
        )

    # One branch around all: what passes through a branch unchanged is copied there.
    is_asked = jnp.any(biased | penalised | suppressed | masked | drawn)
    tokens = jax.lax.cond(is_asked, choose, argmax, logits)
    return Sampled(tokens, is_finite)


def _filter_and_draw(
    logits: Float[Array, "rows vocab"], s: SamplingArrays, positions: Int[Array, " rows"], rows: Bool[Array, " rows"]
) -> Int[Array, " rows"]:
    # Relative to the largest, so that no temperature makes infinities of two logits.
    temperature = s.controls.temperature
    logits = (logits - logits.max(axis=1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    for name, keep in FILTERS.items():
        logits = _when(rows & _is_on(s.controls, name), keep, logits, getattr(s.controls, name))
    return draw(logits, s.seed, positions)


def _is_on(controls: ControlArrays, name: str) -> Bool[Array, " rows"]:
    is_on: Array = getattr(controls, name) != CONTROLS[name].off[0]
    return is_on


def _when(
    rows: Bool[Array, " rows"],
    apply: Callable[..., Array],
    logits: Float[Array, "rows vocab"],
    *rest: Shaped[Array, " rows"],
) -> Float[Array, "rows vocab"]:
    """`apply(logits, *rest)` if it is for any row."""
    changed: Array = jax.lax.cond(jnp.any(rows), apply, lambda x, *_: x, logits, *rest)
    return changed


class TopLogprobs(NamedTuple):
    """Log-probabilities of the raw logits at temperature 1: the chosen token's, and the likeliest tokens' with ids."""

    chosen: Float[Array, " rows"]
    ids: Int[Array, "rows 20"]
    values: Float[Array, "rows 20"]


def top_logprobs(
    logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"], wanted: Bool[Array, ""]
) -> TopLogprobs:
    """Log-probabilities before any bias, penalty, temperature or filter; zeros where none are `wanted`."""
    rows, width = logits.shape[0], min(MAX_TOP_LOGPROBS, logits.shape[1])

    def compute(x: Float[Array, "rows vocab"]) -> TopLogprobs:
        normaliser = jax.nn.logsumexp(x, axis=1, keepdims=True)
        values, ids = jax.lax.top_k(x, width)
        chosen = jnp.take_along_axis(x, tokens[:, None], axis=1) - normaliser
        return TopLogprobs(chosen[:, 0], ids.astype(jnp.int32), values - normaliser)

    nothing = TopLogprobs(jnp.zeros(rows), jnp.zeros((rows, width), jnp.int32), jnp.zeros((rows, width)))
    return jax.lax.cond(wanted, compute, lambda _: nothing, logits)
