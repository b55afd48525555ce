"""The bounds of `rounding`: a kernel that only rounds keeps them, whatever the rows, and one that is a little wrong
does not. Kernels in NumPy, which round where real ones do, because thousands of rows are looked at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from jaxllama.model.attention.agreement import Agreement, _Apart
from jaxllama.model.attention.rounding import exact_attention, limits

SEEDS = 40
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def to_float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Kernel:
    """What it rounds, and how it is wrong. A block's sum is kept as flywheel keeps it."""

    rounded: Callable[[np.ndarray], np.ndarray] = to_bfloat16
    block: int = 128
    scale: float = 1.0
    shift: int = 0  # of the last key that is seen
    lost: int | None = None  # a key that no query sees
    adds: float = 0.0

    def attend(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int) -> np.ndarray:
        tokens, heads, head_dim = q.shape
        rounded = self.rounded
        q = rounded(q * (self.scale * head_dim**-0.5 * math.log2(math.e)))
        out = np.zeros(q.shape)
        for token in range(tokens):
            seen = np.arange(max(1, min(len(keys), start + token + 1 + self.shift)))
            seen = seen[seen != self.lost] if len(seen) > 1 else seen
            for head in range(heads):
                own = head // (heads // keys.shape[1])
                scores = to_float32(keys[seen, own] @ q[token, head])
                probs = np.exp2(scores - scores.max())
                sums = np.zeros(head_dim)
                for at in range(0, len(seen), self.block):
                    part = slice(at, at + self.block)
                    sums = rounded(sums + rounded(probs[part]) @ values[seen[part], own])
                out[token, head] = rounded(sums / probs.sum() + self.adds)
        return out


def agreement_of(kernel: Kernel, seed: int, lengths: tuple[int, ...], tokens: int, dtype: str) -> Agreement:
    rng, apart = np.random.default_rng(seed), _Apart()
    for length in lengths:
        at_once = min(tokens, length)
        q = kernel.rounded(3 * rng.standard_normal((at_once, HEADS, HEAD_DIM)))
        keys, values = kernel.rounded(rng.standard_normal((2, length, KV_HEADS, HEAD_DIM)))
        exact = exact_attention(q, keys, values, length - at_once, dtype=dtype, num_roundings=1)
        apart.add(kernel.attend(q, keys, values, length - at_once) - exact.out, exact.spread)
    return apart.agreement("decode")


def random_lengths(seed: int) -> tuple[int, ...]:
    """Ragged, over all magnitudes."""
    return tuple(int(n) for n in np.exp(np.random.default_rng(seed).uniform(0, np.log(900), 6)).astype(int))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_kernel_that_only_rounds_is_within_the_bounds(dtype):
    right = Kernel(to_bfloat16 if dtype == "bfloat16" else to_float32)
    found = [agreement_of(right, seed, random_lengths(seed), 1 + seed % 5, dtype) for seed in range(SEEDS)]
    assert all(each.holds for each in found), max(each.share for each in found)
    # Not by a bound so wide that nothing would be seen.
    if dtype == "bfloat16":
        assert np.median([each.share for each in found]) > 0.15


WRONG = {
    "2 % too sharp": Kernel(scale=1.02),
    "a key too few": Kernel(shift=-1),
    "the first key is lost": Kernel(lost=0),
    "a hundredth is added": Kernel(adds=0.01),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_is_a_little_wrong_is_not(wrong):
    """Of a chunk of 48 tokens after 200 others, as a check has several."""
    for seed in range(4):
        assert not agreement_of(WRONG[wrong], seed, (248, 130), 48, "bfloat16").holds, seed


def test_the_limits_grow_with_the_values_and_shrink_with_the_heads():
    few, many = limits(1000, 8), limits(10**7, 80_000)
    assert few[0] < many[0] < 6
    assert few[1] > many[1] > math.sqrt(1 / 3)
    assert many[1] < 0.6


def test_nan_and_a_difference_where_nothing_is_rounded_hold_nowhere():
    for difference in (np.nan, 1e-30):
        apart = _Apart()
        apart.add(np.full((1, 1, 2), difference), np.array([[[0.0, 1.0]]]))
        assert not apart.agreement("decode").holds
    apart = _Apart()
    apart.add(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)))
    assert apart.agreement("decode").holds
    assert not dataclasses.replace(apart.agreement("decode"), row_alone=False).holds
