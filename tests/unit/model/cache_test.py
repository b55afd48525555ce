"""What is written to the paged cache is read back from where the page table says, and nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllama.model.cache import (
    HeadLayout,
    KVPool,
    interleave_kv,
    kv_bytes_per_token,
    kv_pool_shapes,
    write_pages,
    write_tokens,
)

pytestmark = pytest.mark.optimized

PAGE, KV2, DIM = 4, 6, 10


def make_pool(num_pages: int = 9) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num_pages, PAGE, KV2, DIM)).astype(np.float32)


def make_kv(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*shape, KV2, DIM)).astype(np.float32)


def test_the_pool_has_room_for_every_layer():
    config = tiny.config_of("wide_heads_tied")
    pool = kv_pool_shapes(config, 7, 16, jnp.float32)
    assert pool.pages.shape == (3 * 7, 16, 2 * 2, 16)
    assert pool.scales is None
    assert kv_bytes_per_token(config, jnp.float32) * 7 * 16 == pool.pages.size * 4
    assert kv_bytes_per_token(config, jnp.bfloat16) * 2 == kv_bytes_per_token(config, jnp.float32)


def test_keys_and_values_alternate_by_head():
    k, v = (np.random.default_rng(i).standard_normal((2, 5, 3, DIM)) for i in (2, 3))
    kv = np.asarray(interleave_kv(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)))
    assert kv.shape == (2, 5, 6, DIM)
    np.testing.assert_array_equal(kv[:, :, 0::2], k.astype(np.float32))
    np.testing.assert_array_equal(kv[:, :, 1::2], v.astype(np.float32))


def test_tokens_go_where_the_page_table_says():
    pool, kv = make_pool(), make_kv(4)
    table = np.array([[3, 1, 0], [2, 5, 7], [4, 0, 0], [6, 8, 0]], np.int32)
    positions, valid = np.array([5, 11, 0, 3]), np.array([True, True, False, True])
    want = pool.copy()
    want[1, 1], want[7, 3], want[6, 3] = kv[0], kv[1], kv[3]
    got = jax.jit(write_tokens)(KVPool(pool, None), kv, table, positions, valid).pages
    np.testing.assert_array_equal(got, want)


def test_rows_that_are_not_valid_write_nothing():
    pool, kv = make_pool(), make_kv(2)
    unwritten = KVPool(jnp.asarray(pool), None)
    got = jax.jit(write_tokens)(unwritten, kv, np.zeros((2, 3), np.int32), np.array([0, 7]), np.zeros(2, bool)).pages
    np.testing.assert_array_equal(got, pool)


def test_a_chunk_is_written_page_by_page():
    pool, kv = make_pool(), make_kv(3 * PAGE)
    table = np.array([8, 3, 5, 1, 0, 0, 0, 0], np.int32)
    want = pool.copy()
    want[3], want[5], want[1] = kv.reshape(3, PAGE, KV2, DIM)
    got = jax.jit(write_pages)(KVPool(pool, None), kv, table, np.int32(PAGE), np.int32(3 * PAGE)).pages
    np.testing.assert_array_equal(got, want)


def test_pages_past_a_chunk_s_tokens_are_not_touched():
    pool, kv = make_pool(), make_kv(3 * PAGE)
    table = np.array([8, 3, 5, 1, 0, 0], np.int32)
    for num_tokens in range(3 * PAGE + 1):
        unwritten = KVPool(jnp.asarray(pool), None)
        got = np.asarray(jax.jit(write_pages)(unwritten, kv, table, np.int32(PAGE), np.int32(num_tokens)).pages)
        num_pages = -(-num_tokens // PAGE)
        for index, page in enumerate(table[1:4]):
            real = slice(0, min(PAGE, max(0, num_tokens - index * PAGE)))
            np.testing.assert_array_equal(got[page, real], kv.reshape(3, PAGE, KV2, DIM)[index, real])
            if index >= num_pages:
                np.testing.assert_array_equal(got[page], pool[page])
        untouched = [page for page in range(9) if page not in table[1:4]]
        np.testing.assert_array_equal(got[untouched], pool[untouched])


def test_writing_keeps_the_pool_s_dtype():
    pool = KVPool(jnp.asarray(make_pool(), jnp.bfloat16), None)
    kv = make_kv(2)
    got = jax.jit(write_tokens)(pool, kv, np.array([[1], [2]], np.int32), np.array([0, 1]), np.ones(2, bool)).pages
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[1, 0], kv[0].astype(jnp.bfloat16))


# ---- int8 ----


def read(pool: KVPool) -> np.ndarray:
    """[pages, page_size, 2K, D]"""
    assert pool.scales is not None
    values = np.asarray(pool.pages, np.float64) * np.asarray(pool.scales, np.float64)[..., None]
    return values.swapaxes(1, 2)


def empty_int8() -> KVPool:
    return KVPool(jnp.full((9, KV2, PAGE, DIM), 7, jnp.int8), jnp.full((9, KV2, PAGE), 0.5))


def test_int8_takes_a_byte_a_number_and_four_a_scale():
    config = tiny.config_of("wide_heads_tied")
    pool = kv_pool_shapes(config, 7, 16, jnp.int8)
    assert pool.scales is not None
    assert pool.pages.shape == (config.num_layers * 7, 2 * config.num_kv_heads, 16, config.head_dim)
    assert pool.page_size == 16
    assert pool.scales.shape == pool.pages.shape[:3]
    numbers = kv_bytes_per_token(config, jnp.bfloat16) // 2
    assert kv_bytes_per_token(config, jnp.int8) == numbers + 4 * numbers // 16


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e30])
def test_int8_is_off_by_half_a_step_at_most(magnitude):
    kv = make_kv(2 * PAGE) * magnitude
    table = np.array([3, 5], np.int32)
    chunk = jax.jit(write_pages)(empty_int8(), kv, table, np.int32(0), np.int32(2 * PAGE))
    step = np.abs(kv).max(axis=-1, keepdims=True) / 127
    assert (np.abs(read(chunk)[[3, 5]].reshape(kv.shape) - kv) <= 0.5001 * step).all()
    # One by one the tokens get the same bits.
    one_by_one = empty_int8()
    for position, token in enumerate(kv):
        one_by_one = jax.jit(write_tokens)(one_by_one, token[None], table[None], np.array([position]), np.ones(1, bool))
    for a, b in zip(chunk, one_by_one, strict=True):
        np.testing.assert_array_equal(a, b)


def test_int8_leaves_every_other_slot_alone():
    got = jax.jit(write_tokens)(
        empty_int8(), make_kv(2), np.array([[3], [4]], np.int32), np.array([1, 2]), np.array([True, False])
    )
    for part, old in zip(got, empty_int8(), strict=True):
        want = np.array(old)
        want[3, :, 1] = np.asarray(part)[3, :, 1]
        np.testing.assert_array_equal(part, want)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_of_a_number_that_is_none_says_so_in_the_scale(bad):
    kv = make_kv(2)
    kv[0, 1, 4] = bad
    table, positions = np.array([[1], [2]], np.int32), np.array([0, 0])
    pool = jax.jit(write_tokens)(empty_int8(), kv, table, positions, np.ones(2, bool))
    is_nan = np.isnan(np.asarray(pool.scales))
    assert np.argwhere(is_nan).tolist() == [[1, 1, 0]]


def test_int8_of_zeros_is_zero():
    kv = make_kv(1)
    kv[0, 2] = 0
    pool = jax.jit(write_tokens)(empty_int8(), kv, np.array([[1]], np.int32), np.array([0]), np.ones(1, bool))
    np.testing.assert_array_equal(read(pool)[1, 0, 2], 0)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_is_written_in_place(rows):
    """XLA turns a scatter of one index into an update that copies the whole pool."""
    pool = jnp.zeros((64, 4, 6, 16), jnp.float32)

    def step(_, pool):
        kv = pool[:rows, 0] + 1
        table, positions = jnp.ones((rows, 3), jnp.int32), jnp.arange(rows, dtype=jnp.int32)
        return write_tokens(KVPool(pool, None), kv, table, positions, positions < 9).pages

    program = jax.jit(lambda pool, n: jax.lax.fori_loop(0, n, step, pool), donate_argnums=0).lower(pool, 3).compile()
    copied = [line for line in program.as_text().splitlines() if " copy(" in line]
    assert not [line for line in copied if "[64,4" in line or "[256,6" in line]


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "shards", "want"),
    [
        (8, 128, 2, HeadLayout(8, 1, 128)),
        (8, 64, 1, HeadLayout(4, 2, 128)),
        (8, 64, 8, HeadLayout(8, 1, 128)),  # one head a device has nothing beside it
        (3, 64, 1, HeadLayout(2, 2, 128)),
        (15, 64, 5, HeadLayout(10, 2, 128)),
        (4, 80, 1, HeadLayout(4, 1, 128)),
        (4, 160, 1, HeadLayout(4, 1, 256)),
        (3, 32, 1, HeadLayout(1, 3, 128)),
    ],
)
def test_heads_lie_side_by_side_as_far_as_they_fill_the_lanes(kv_heads, head_dim, shards, want):
    config = tiny.config_of(
        "divisible", num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    layout = HeadLayout.in_lanes(config, shards)
    assert layout == want
    pool = kv_pool_shapes(config, 7, 16, jnp.bfloat16, layout=layout)
    assert pool.pages.shape == (config.num_layers * 7, 16, 2 * want.num_rows, want.width)
    scales = kv_pool_shapes(config, 7, 16, jnp.int8, layout=layout).scales
    assert scales.shape == (config.num_layers * 7, 2 * want.num_rows * want.per_row, 16)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(8, 64), (3, 64), (2, 48), (1, 64), (3, 32), (2, 80), (2, 128)])
def test_attention_over_heads_side_by_side_is_that_of_each(kv_heads, head_dim):
    """Scores are equal, each query gets values of its own head, and scales are of the lanes they were made for."""
    group, tokens = 3, 5
    config = tiny.config_of(
        "divisible", num_attention_heads=group * kv_heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    layout = HeadLayout.in_lanes(config, 1)
    rng = np.random.default_rng(kv_heads)
    kv = rng.integers(-9, 9, (tokens, 2 * kv_heads, head_dim)).astype(np.float32)
    q = rng.integers(-9, 9, (tokens, group * kv_heads, head_dim)).astype(np.float32)
    packed, packed_q = np.asarray(layout.pack(kv)), np.asarray(layout.pack_queries(q, kv_heads))
    rows = packed.shape[1] // 2
    assert packed.shape == (tokens, 2 * layout.num_rows, layout.width)
    scores = np.einsum("tgd,sgd->gts", q, np.repeat(kv[:, 0::2], group, axis=1))
    by_row = np.repeat(packed[:, 0::2], packed_q.shape[1] // rows, axis=1)
    packed_scores = np.einsum("tgd,sgd->gts", packed_q, by_row)
    np.testing.assert_array_equal(packed_scores[: len(scores)], scores)
    values = np.einsum("gts,sgd->tgd", scores, np.repeat(kv[:, 1::2], group, axis=1))
    packed_values = np.einsum(
        "gts,sgd->tgd", packed_scores, np.repeat(packed[:, 1::2], packed_q.shape[1] // rows, axis=1)
    )
    got = layout.unpack(packed_values, group * kv_heads, kv_heads, head_dim)
    np.testing.assert_array_equal(np.asarray(got), values)
    scales = rng.standard_normal((tokens, 2 * kv_heads)).astype(np.float32)
    lanes = np.repeat(np.asarray(layout.pack_scales(scales)).reshape(*packed.shape[:2], -1), head_dim, axis=2)
    lanes = np.pad(lanes, [(0, 0), (0, 0), (0, layout.width - lanes.shape[2])])
    np.testing.assert_array_equal(lanes * packed, np.asarray(layout.pack(kv * scales[..., None])))
