"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in the half-split order of Hugging Face checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllama.model.config import LlamaConfig, RopeScaling

_STRIDE = 256


class RotaryAngles(NamedTuple):
    """Cosine and sine of each position's angles, float32 [rows, tokens, 1, head_dim / 2]."""

    cos: Float[Array, "rows tokens 1 half"]
    sin: Float[Array, "rows tokens 1 half"]


def inverse_frequencies(rope: RopeScaling, rotary_dim: int) -> np.ndarray:
    """The angle per position of each pair of the `rotary_dim` dimensions that are rotated, float64 [rotary_dim / 2].

    Source: transformers' `ROPE_INIT_FUNCTIONS`; for `yarn` Peng et al. 2023, arXiv:2309.00071, section 3.
    """
    inv_freq = rope.theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    if rope.rope_type == "longrope":
        return inv_freq / np.asarray(rope.divisors)
    if rope.rope_type == "yarn":
        low, high = (_turning_dim(rope, rotary_dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncates:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        width = high - low if high != low else 0.001
        slow = np.clip((np.arange(rotary_dim // 2) - low) / width, 0, 1)
        return inv_freq * (slow / rope.factor + (1 - slow))
    if rope.rope_type == "llama3":
        wavelengths_in_context = rope.original_max_position_embeddings * inv_freq / (2 * np.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((wavelengths_in_context - rope.low_freq_factor) / span, 0, 1)
        return inv_freq * (keep + (1 - keep) / rope.factor)
    return inv_freq


def _turning_dim(rope: RopeScaling, rotary_dim: int, turns: float) -> float:
    """The dimension whose angle turns `turns` times within the original context; a real number."""
    wavelengths = np.log(rope.original_max_position_embeddings / (turns * 2 * np.pi))
    return float(rotary_dim * wavelengths / (2 * np.log(rope.theta)))


def rotary_angles(config: LlamaConfig, positions: Int[Array, "rows tokens"]) -> RotaryAngles:
    """Cosine and sine at `positions`, accurate to float32 at every position.

    A float32 product position × frequency is off by 0.001 rad at position 20,000. The position is split into a
    multiple of 256 and a rest instead, each looked up in a table made in float64, and the two angles are added.
    """
    inv_freq = inverse_frequencies(config.rope, config.rotary_dim)
    num_coarse = -(-config.max_position_embeddings // _STRIDE)
    coarse = np.arange(num_coarse)[:, None] * _STRIDE * inv_freq
    fine = np.arange(_STRIDE)[:, None] * inv_freq
    cos_a, sin_a = (jnp.asarray(f(coarse), jnp.float32)[positions // _STRIDE] for f in (np.cos, np.sin))
    cos_b, sin_b = (jnp.asarray(f(fine), jnp.float32)[positions % _STRIDE] for f in (np.cos, np.sin))
    cos, sin = cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
    if config.rope.attention_factor != 1:
        cos, sin = cos * config.rope.attention_factor, sin * config.rope.attention_factor
    return RotaryAngles(cos[:, :, None], sin[:, :, None])


def rotate(
    x: Float[Array, "rows tokens heads head_dim"], angles: RotaryAngles
) -> Float[Array, "rows tokens heads head_dim"]:
    """Rotates each head of `x` by its position's angles, in float32, and returns `x`'s dtype.

    Dimensions of a head past those that have angles stay as they are.
    """
    half = angles.cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = (first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin, rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
