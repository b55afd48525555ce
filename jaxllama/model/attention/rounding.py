"""Attention in float64, and how far from it rounding alone can take a kernel.

A kernel rounds what enters its products to a dtype whose last place is a relative `u` (2^-8 of a bfloat16), and sums in
float32 (`w` = 2^-24). To first order a rounding changes one output, `o` = Σ p_j v_j, by `a` times a number of mean 0 in
[-1, 1]. These roundings there are, at most:

* A probability, and once more where it is multiplied with an int8 value's scale: `a` = u p_j v_j.
* A query times its scale. Its element i moves score j by u scale q_i k_ji, and a score that moves by d moves the
  output by d p_j (v_j - o). The values are drawn without regard to the keys, so the squares of all elements add up.
* A sum that is kept in that dtype from one block of keys to the next, as flywheel's is: u times the sum so far.
* The output: u o.
* In float32: the D products and sums of a score, w √D of the root of their sum of squares; the two numbers whose
  difference the exponential is of, w times each, and itself 4 w; each of n sums of values and of probabilities, w times
  the sum so far.

`spread` is the root of the sum of all `a` squared. Roundings are as good as independent (Higham and Mary 2019). Each
is spread evenly over its last place, which makes it sub-Gaussian with the variance 1/3 of its largest, and so
(Hoeffding) a difference of more than λ `spread` has a probability of at most 2 exp(-3 λ² / 2), from which `limits`
follow: of the largest of all differences, and of their root mean square, which sees what is a little wrong everywhere.

Source: Higham and Mary 2019, doi:10.1137/18M1226312 (rounding as chance); Hsu, Kakade and Zhang 2012, arXiv:1110.2842
(sums of squares of sub-Gaussian numbers).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxllama.model.attention.reference import BLOCK_TOKENS

LAST_PLACES = {"float32": 2.0**-22, "bfloat16": 2.0**-8}
"""Half of the last place of 1. A TPU multiplies float32 as six products of bfloat16, which keep 22 bits."""
_SUMS = 2.0**-24
_CHANCE = 1e-9
"""Of a right kernel to be taken for a wrong one."""


class Exact(NamedTuple):
    """What attention gives, and the size of what rounding does to it."""

    out: Float[np.ndarray, "tokens heads head_dim"]
    spread: Float[np.ndarray, "tokens heads head_dim"]


def exact_attention(
    q: Float[np.ndarray, "tokens heads head_dim"],
    keys: Float[np.ndarray, "length kv head_dim"],
    values: Float[np.ndarray, "length kv head_dim"],
    start: int,
    *,
    dtype: str,
    num_roundings: int,
) -> Exact:
    """Of queries from position `start` on over keys from position 0 on. All are float64, and what a cache holds.

    `num_roundings` are a probability's: 2 where it meets an int8 value's scale.
    """
    tokens, heads, head_dim = q.shape
    length, kv_heads, _ = keys.shape
    place, scale = LAST_PLACES[dtype], head_dim**-0.5
    q = q.reshape(tokens, kv_heads, -1, head_dim).swapaxes(0, 1).reshape(kv_heads, -1, head_dim)
    k, v = keys.transpose(1, 2, 0), values.swapaxes(0, 1)
    counts = start + 1 + np.arange(tokens).repeat(heads // kv_heads)
    visible = np.arange(length) < counts[:, None]
    scores = np.where(visible, q @ k * scale, -np.inf)
    largest = scores.max(-1, keepdims=True)
    probs = np.exp(scores - largest)
    probs /= probs.sum(-1, keepdims=True)
    out = probs @ v
    of_scores = (q**2 @ k**2) * scale**2
    argument = np.where(visible, scores, 0.0) ** 2 + largest**2 + 16
    moved = probs**2 * (place**2 * of_scores + _SUMS**2 * (head_dim * of_scores + argument))
    # Sums of probabilities are of rounded ones or of exact ones.
    rounded = np.maximum(probs**2 @ v**2, _about(probs**2, v, out))
    so_far = _sums_so_far(probs, v)
    summed = place**2 * so_far.sum(0) + _SUMS**2 * counts[:, None] * (so_far.max(0) + out**2)
    squares = _about(moved, v, out) + num_roundings * place**2 * rounded + place**2 * out**2 + summed
    shape = (kv_heads, tokens, heads // kv_heads, head_dim)

    def as_given(x: Float[np.ndarray, "kv queries head_dim"]) -> Float[np.ndarray, "tokens heads head_dim"]:
        return x.reshape(shape).swapaxes(0, 1).reshape(tokens, heads, head_dim)

    return Exact(as_given(out), as_given(np.sqrt(squares)))


def limits(num_values: int, num_heads: int) -> tuple[float, float]:
    """The largest, and the root mean square, of so many differences in units of their spread, if only rounding made
    them.

    `num_heads` is how many heads of queries they come from: the elements of one share its roundings.
    """
    largest = math.sqrt(2 / 3 * math.log(2 * num_values / _CHANCE))
    x = math.log(1 / _CHANCE) / num_heads
    return largest, math.sqrt((1 + 2 * math.sqrt(x) + 2 * x) / 3)


def _about(
    weights: Float[np.ndarray, "kv queries length"],
    v: Float[np.ndarray, "kv length head_dim"],
    out: Float[np.ndarray, "kv queries head_dim"],
) -> Float[np.ndarray, "kv queries head_dim"]:
    """Σ weights (v - out)²."""
    total = weights.sum(-1, keepdims=True)
    return np.maximum(weights @ v**2 - 2 * out * (weights @ v) + out**2 * total, 0)


def _sums_so_far(
    probs: Float[np.ndarray, "kv queries length"], v: Float[np.ndarray, "kv length head_dim"]
) -> Float[np.ndarray, "blocks kv queries head_dim"]:
    """The squares of the sums after each block of keys."""
    ends = range(0, v.shape[1], BLOCK_TOKENS)
    blocks = [probs[:, :, at : at + BLOCK_TOKENS] @ v[:, at : at + BLOCK_TOKENS] for at in ends]
    squares: Float[np.ndarray, "blocks kv queries head_dim"] = np.cumsum(blocks, axis=0) ** 2
    return squares
