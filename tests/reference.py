"""Slow and obvious float64 NumPy twins of the forward pass and of sampling, written from the papers. No JAX.

The forward pass takes Hugging Face names and layouts, so that nothing of jaxllama's tree is between it and a
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from jaxllama.decode.params import SamplingParams
    from jaxllama.model.config import LlamaConfig, RopeScaling

type Array = NDArray[np.float64]
type Weights = Mapping[str, NDArray[Any]]
type Cached = Callable[[Array], Array]


# ---- The forward pass ----


def inverse_frequencies(rope: RopeScaling, head_dim: int) -> Array:
    """Angle per position of each rotary pair, `[head_dim / 2]`.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; linear: Chen et al. 2023, arXiv:2306.15595; llama3: Meta's
    description in the Llama 3.1 release (wavelengths longer than the original context slow down by `factor`).
    """
    frequencies = np.array([rope.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)])
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return np.array([_llama3_frequency(rope, frequency) for frequency in frequencies])
    if rope.rope_type == "yarn":
        return np.array([_yarn_frequency(rope, pair, head_dim) for pair in range(head_dim // 2)])
    return frequencies


def _yarn_frequency(rope: RopeScaling, pair: int, head_dim: int) -> float:
    """Source: Peng et al. 2023, arXiv:2309.00071, section 3.2, with the bounds on whole dimensions."""

    def pair_that_turns(turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), head_dim - 1)
    slowed = min(max((pair - low) / (high - low), 0), 1)
    frequency = rope.theta ** (-2 * pair / head_dim)
    return (1 - slowed) * frequency + slowed * frequency / rope.factor


def _llama3_frequency(rope: RopeScaling, frequency: float) -> float:
    turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)  # within the original context
    if turns > rope.high_freq_factor:
        return frequency
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return kept * frequency + (1 - kept) * frequency / rope.factor


def rotate(x: Array, positions: NDArray[Any], inv_freq: Array) -> Array:
    """Rotates each head's pairs (i, i + D/2) of `x` `[T, heads, D]` by their position's angle."""
    rotated = np.empty_like(x)
    half = x.shape[-1] // 2
    for pair, frequency in enumerate(inv_freq):
        cos, sin = np.cos(positions * frequency)[:, None], np.sin(positions * frequency)[:, None]
        first, second = x[..., pair], x[..., pair + half]
        rotated[..., pair] = first * cos - second * sin
        rotated[..., pair + half] = second * cos + first * sin
    return rotated


def rms_norm(x: Array, weight: NDArray[Any], eps: float) -> Array:
    """Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def softmax(scores: Array) -> Array:
    """Over the last axis; an entry of −inf gets probability 0."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _linear(weights: Weights, name: str, x: Array) -> Array:
    y = x @ np.asarray(weights[f"{name}.weight"], np.float64).T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + np.asarray(bias, np.float64)


def round_to_int8(x: Array) -> Array:
    """Each row of the last axis to the nearest of 255 values, from minus its largest magnitude to plus."""
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / np.where(step > 0, step, 1)) * step


def _attention(
    weights: Weights, config: LlamaConfig, prefix: str, x: Array, positions: NDArray[Any], cached: Cached
) -> Array:
    num_tokens, inv_freq = len(x), inverse_frequencies(config.rope, config.head_dim)
    q = _linear(weights, f"{prefix}.q_proj", x).reshape(num_tokens, config.num_heads, config.head_dim)
    k = _linear(weights, f"{prefix}.k_proj", x).reshape(num_tokens, config.num_kv_heads, config.head_dim)
    v = _linear(weights, f"{prefix}.v_proj", x).reshape(num_tokens, config.num_kv_heads, config.head_dim)
    q, k, v = rotate(q, positions, inv_freq), cached(rotate(k, positions, inv_freq)), cached(v)
    future = np.triu(np.ones((num_tokens, num_tokens), bool), 1)
    heads = []
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        scores = q[:, head] @ k[:, kv_head].T / math.sqrt(config.head_dim)
        heads.append(softmax(np.where(future, -np.inf, scores)) @ v[:, kv_head])
    return _linear(weights, f"{prefix}.o_proj", np.concatenate(heads, axis=-1))


def _mlp(weights: Weights, prefix: str, x: Array) -> Array:
    gate = _linear(weights, f"{prefix}.gate_proj", x)
    return _linear(
        weights, f"{prefix}.down_proj", gate / (1 + np.exp(-gate)) * _linear(weights, f"{prefix}.up_proj", x)
    )


def llama_logits(
    weights: Weights,
    config: LlamaConfig,
    ids: Sequence[int],
    positions: int | Sequence[int] = 0,
    cached: Cached = lambda x: x,
) -> Array:
    """Logits `[T, V]` after each token of one sequence.

    `weights` has Hugging Face names and layouts. `positions` is the first token's position, or every token's; attention
    sees all earlier tokens of `ids` whatever their positions. `cached` is what a cache makes of keys and values,
    `[T, kv_heads, D]`.

    Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    at = np.arange(len(ids)) + positions if isinstance(positions, int) else np.asarray(positions)
    x = np.asarray(weights["model.embed_tokens.weight"], np.float64)[np.asarray(ids)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
        x = x + _attention(weights, config, f"{prefix}.self_attn", normed, at, cached)
        normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + _mlp(weights, f"{prefix}.mlp", normed)
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return x @ np.asarray(head, np.float64).T


# ---- Sampling: one row of logits [V] ----


def log_probabilities(logits: NDArray[Any]) -> Array:
    """Of the model itself: temperature 1, before any bias, penalty or filter."""
    logits = np.asarray(logits, np.float64)
    return logits - logits.max() - math.log(sum(math.exp(value - logits.max()) for value in logits))


def apply_logit_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """Adds each bias to its token's logit (OpenAI's `logit_bias`)."""
    logits = np.array(logits, np.float64)
    for token_id, value in bias.items():
        logits[token_id] += value
    return logits


def apply_penalties(
    logits: Array,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Array:
    """Repetition over prompt and output first, then frequency and presence over the output.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, with negative logits multiplied as in transformers;
    OpenAI's `logit -= count * frequency_penalty + (count > 0) * presence_penalty`.
    """
    logits = np.array(logits, np.float64)
    for token_id in {*prompt_ids, *output_ids}:
        positive = logits[token_id] > 0
        logits[token_id] = logits[token_id] / repetition_penalty if positive else logits[token_id] * repetition_penalty
    for token_id in set(output_ids):
        count = list(output_ids).count(token_id)
        logits[token_id] -= count * frequency_penalty + presence_penalty
    return logits


def mask_stops_before(logits: Array, num_output: int, min_tokens: int, stop_ids: Iterable[int]) -> Array:
    """Makes every stop id impossible until `min_tokens` tokens are out."""
    logits = np.array(logits, np.float64)
    if num_output < min_tokens:
        logits[list(stop_ids)] = -np.inf
    return logits


def keep_top_k(logits: Array, top_k: int) -> Array:
    """Keeps the tokens that fewer than `top_k` tokens beat, so all that tie with the k-th. 0 and −1 keep everything."""
    if top_k <= 0:
        return np.array(logits, np.float64)
    return np.where([np.count_nonzero(logits > value) < top_k for value in logits], logits, -np.inf)


def keep_top_p(logits: Array, top_p: float) -> Array:
    """Keeps the tokens that likelier tokens with a total probability below `top_p` beat; ties stand or fall together.

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    if top_p >= 1:
        return np.array(logits, np.float64)
    probabilities = softmax(np.asarray(logits, np.float64))
    mass_above: dict[float, float] = {}
    total = 0.0
    for value in sorted(probabilities, reverse=True):
        mass_above.setdefault(value, total)
        total += value
    return np.where([mass_above[value] < top_p for value in probabilities], logits, -np.inf)


def keep_min_p(logits: Array, min_p: float) -> Array:
    """Keeps the tokens at least `min_p` times as likely as the likeliest.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    probabilities = softmax(np.asarray(logits, np.float64))
    return np.where(probabilities >= min_p * probabilities.max(), logits, -np.inf)


def filtered_logits(
    logits: Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Array:
    """Temperature, then each filter over the survivors of the one before. `temperature` must be positive."""
    scaled = np.asarray(logits, np.float64) / temperature
    return keep_min_p(keep_top_p(keep_top_k(scaled, top_k), top_p), min_p)


def distribution(
    logits_row: NDArray[Any],
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    eos_token_ids: Sequence[int] = (),
) -> Array:
    """The exact probabilities `[V]` from which the next token is drawn.

    Temperature 0 puts everything on the likeliest token, the lowest id among equals. `eos_token_ids` are the model's;
    with `ignore_eos` they are ordinary tokens, also for `min_tokens`.
    """
    logits = apply_logit_bias(np.asarray(logits_row, np.float64), params.logit_bias)
    logits = apply_penalties(
        logits,
        prompt_ids,
        output_ids,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    logits = mask_stops_before(logits, len(output_ids), params.min_tokens, stop_ids)
    if params.temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    return softmax(
        filtered_logits(
            logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
        )
    )
