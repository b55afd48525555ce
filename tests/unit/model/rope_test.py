"""Rotary angles are those of the papers, at every position to float32's accuracy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from jaxllama.model.rope import inverse_frequencies, rotary_angles, rotate

pytestmark = pytest.mark.optimized

# One float32 rounding in each table entry, two products and a sum: a few units in the last place of 1.
TOLERANCE = 4e-7
POSITIONS = np.array([0, 1, 2, 63, 255, 256, 257, 511, 512, 1023, 1024, 2047])
FAR = np.array([8191, 8192, 16_383, 19_999, 20_000, 20_017, 65_535, 99_991, 131_071])


@pytest.mark.parametrize("name", tiny.MODELS)
def test_inverse_frequencies_agree_with_the_reference(name):
    config = tiny.config_of(name)
    want = reference.inverse_frequencies(config.rope, config.head_dim)
    got = inverse_frequencies(config.rope, config.head_dim)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    assert got.dtype == np.float64


def test_llama3_scaling_has_its_three_bands():
    config = tiny.config_of("llama31_like")
    plain = 500_000.0 ** -(np.arange(0, 32, 2) / 32)
    ratio = inverse_frequencies(config.rope, 32) / plain
    wavelengths = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 1 / 8)
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert len(between)
    assert np.all((between > 1 / 8) & (between < 1))


@pytest.mark.parametrize("name", ["tinyllama_like", "linear_rope", "llama31_like", "llama32_like_tied"])
def test_angles_are_accurate_at_every_position(name):
    config = tiny.config_of(name)
    positions = POSITIONS if config.max_position_embeddings < 20_000 else np.concatenate([POSITIONS, FAR])
    angles = rotary_angles(config, jnp.asarray(positions[None]))
    exact = positions[:, None] * reference.inverse_frequencies(config.rope, config.head_dim)
    assert angles.cos.dtype == angles.sin.dtype == jnp.float32
    assert angles.cos.shape == (1, len(positions), 1, config.head_dim // 2)
    np.testing.assert_allclose(angles.cos[0, :, 0], np.cos(exact), atol=TOLERANCE)
    np.testing.assert_allclose(angles.sin[0, :, 0], np.sin(exact), atol=TOLERANCE)


def test_the_last_position_of_any_context_has_its_own_angle():
    for context in (1, 100, 256, 257, 2048):
        config = tiny.config_of("one_kv_head", max_position_embeddings=context)
        angles = rotary_angles(config, jnp.array([[context - 1]]))
        exact = (context - 1) * reference.inverse_frequencies(config.rope, config.head_dim)
        np.testing.assert_allclose(angles.cos[0, 0, 0], np.cos(exact), atol=TOLERANCE)


def test_rotation_agrees_with_the_reference():
    config = tiny.config_of("llama31_like")
    x = np.random.default_rng(0).standard_normal((3, 20, 5, config.head_dim)).astype(np.float32)
    positions = np.stack([np.arange(20), 20_000 + np.arange(20), 131_000 + np.arange(20)])
    got = jax.jit(lambda x, p: rotate(x, rotary_angles(config, p)))(x, jnp.asarray(positions))
    inv_freq = reference.inverse_frequencies(config.rope, config.head_dim)
    for row in range(3):
        np.testing.assert_allclose(got[row], reference.rotate(x[row], positions[row], inv_freq), atol=3e-6)


def test_rotation_keeps_lengths_and_position_zero_changes_nothing():
    config = tiny.config_of("one_kv_head")
    x = np.random.default_rng(1).standard_normal((1, 9, 4, config.head_dim)).astype(np.float32)
    got = np.asarray(rotate(jnp.asarray(x), rotary_angles(config, jnp.arange(9)[None] * 200)))
    np.testing.assert_array_equal(got[:, 0], x[:, 0])
    half = config.head_dim // 2
    lengths = [np.hypot(y[..., :half], y[..., half:]) for y in (x, got)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_bfloat16_is_rotated_in_float32():
    config = tiny.config_of("one_kv_head")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 5, 4, config.head_dim)), jnp.bfloat16)
    angles = rotary_angles(config, jnp.array([[0, 257, 1001, 1999, 2047]]))
    got = rotate(x, angles)
    assert got.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), angles)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(exact.astype(jnp.bfloat16), np.float32))
