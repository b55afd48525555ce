"""The forward pass is Llama's: every variant against the float64 reference and against transformers."""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from oracle.tiny_models import TINY_MODELS

from jaxllama import EngineOptions, LlamaConfig

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parents[2] / "golden"
NUM_TOKENS = 150  # more than one chunk of `logits`
TOLERANCE = 5e-6  # of the logits' spread; measured: up to 1.5e-6


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "tiny_models.npz"))


def ids_of(name: str) -> list[int]:
    """The golden's sequence, continued: what follows does not change its logits."""
    first = golden().get(f"{name}/near_ids", np.zeros(0, int)).tolist()
    return first + tiny.prompt_of(name, NUM_TOKENS - len(first), seed=1)


@functools.cache
def logits_of(name: str, dtype: str = "float32") -> np.ndarray:
    with tiny.make_llama(name, dtype=jnp.dtype(dtype)) as llama:
        return llama.logits(ids_of(name))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_agree_with_the_reference(name):
    want, got = tiny.reference_logits(name, ids_of(name)), logits_of(name)
    assert got.dtype == np.float32
    assert got.shape == (NUM_TOKENS, TINY_MODELS[name]["vocab_size"])
    assert np.abs(got - want).max() < TOLERANCE * want.std()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_agree_with_transformers(name):
    want = golden()[f"{name}/near_logits"]
    assert golden()[f"{name}/near_positions"].tolist() == list(range(len(want)))
    # Both sides are float32 here.
    assert np.abs(logits_of(name)[: len(want)] - want).max() < 2 * TOLERANCE * want.std()


def test_far_positions_agree_with_the_reference():
    """llama3 rope scaling, 20,000 positions back: attention of one layer, so that the reference needs no square."""
    name, num_tokens, num_checked = "far", 20_021, 21
    config, weights = tiny.config_of(name), tiny.weights_of(name)
    assert config.rope.rope_type == "llama3"
    ids = np.array(tiny.prompt_of(name, num_tokens))
    with tiny.make_llama(name, options=EngineOptions(page_size=64, chunk_sizes=(64,), max_rows=1)) as llama:
        got = llama.logits(ids)[-num_checked:]
    want = last_logits_of_one_layer(config, weights, ids, num_checked)
    assert np.abs(got - want).max() < 2 * TOLERANCE * want.std()


def last_logits_of_one_layer(config: LlamaConfig, weights: tiny.Weights, ids: np.ndarray, num_last: int) -> np.ndarray:
    """Float64 logits of the last tokens: with one layer they need the others' keys and values only."""
    assert config.num_layers == 1
    w = {key.removeprefix("model.layers.0."): np.asarray(value, np.float64) for key, value in weights.items()}
    embedded = w["model.embed_tokens.weight"][ids]
    normed = reference.rms_norm(embedded, w["input_layernorm.weight"], config.rms_norm_eps)
    positions, inv_freq = np.arange(len(ids)), reference.inverse_frequencies(config.rope, config.head_dim)

    def project(x: np.ndarray, name: str, heads: int) -> np.ndarray:
        return (x @ w[f"self_attn.{name}.weight"].T).reshape(len(x), heads, config.head_dim)

    factor = config.rope.attention_factor
    k = factor * reference.rotate(project(normed, "k_proj", config.num_kv_heads), positions, inv_freq)
    v = project(normed, "v_proj", config.num_kv_heads)
    last = slice(len(ids) - num_last, None)
    q = factor * reference.rotate(project(normed[last], "q_proj", config.num_heads), positions[last], inv_freq)
    window = config.window(0) or len(ids)
    hidden = (positions > positions[last][:, None]) | (positions <= positions[last][:, None] - window)
    heads = []
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        scores = q[:, head] @ k[:, kv_head].T / np.sqrt(config.head_dim)
        heads.append(reference.softmax(np.where(hidden, -np.inf, scores)) @ v[:, kv_head])
    x = embedded[last] + np.concatenate(heads, axis=-1) @ w["self_attn.o_proj.weight"].T
    normed = reference.rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = normed @ w["mlp.gate_proj.weight"].T, normed @ w["mlp.up_proj.weight"].T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T
    return reference.rms_norm(x, w["model.norm.weight"], config.rms_norm_eps) @ w["lm_head.weight"].T


def test_the_shortcut_for_far_positions_is_the_reference():
    config, ids = tiny.config_of("far"), tiny.prompt_of("far", 40)
    want = tiny.reference_logits("far", ids)[-7:]
    got = last_logits_of_one_layer(config, tiny.weights_of("far"), np.array(ids), 7)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("name", ["wide_heads_tied", "biased"])
def test_bfloat16_stays_close_to_float32(name):
    exact, rounded = logits_of(name), logits_of(name, "bfloat16")
    assert rounded.dtype == np.float32
    p, q = (reference.softmax(x.astype(np.float64)) for x in (exact, rounded))
    divergence = (p * np.log(p / q)).sum(axis=1)
    assert divergence.mean() < 1e-3
    assert 1e-3 < np.abs(exact - rounded).max() < 0.3
    # Rounding loses a near-tie here and there.
    assert (exact.argmax(axis=1) == rounded.argmax(axis=1)).mean() > 0.9


def test_later_tokens_do_not_change_earlier_logits():
    with tiny.make_llama("biased") as llama:
        ids = ids_of("biased")
        for cut in (1, 64, 127, 128, 129, 149):
            changed = [*ids[:cut], *((token_id + 1) % 139 for token_id in ids[cut:])]
            got = llama.logits(changed)
            np.testing.assert_array_equal(got[:cut], logits_of("biased")[:cut])
            assert np.abs(got[cut:] - logits_of("biased")[cut:]).max() > 0.1
