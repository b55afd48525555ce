"""What is written to the paged cache is read back from where the page table says, and nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxllama.cache import interleave_kv, kv_bytes_per_token, kv_pool_shape, write_pages, write_tokens

PAGE, KV2, DIM = 4, 6, 10


def make_pool(num_pages: int = 9) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num_pages, PAGE, KV2, DIM)).astype(np.float32)


def make_kv(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*shape, KV2, DIM)).astype(np.float32)


def test_the_pool_has_room_for_every_layer():
    config = tiny.config_of("wide_heads_tied")
    shape = kv_pool_shape(config, 7, 16)
    assert shape == (3 * 7, 16, 2 * 2, 16)
    assert kv_bytes_per_token(config, jnp.float32) * 7 * 16 == np.prod(shape) * 4
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
    got = jax.jit(write_tokens)(pool, kv, table, positions, valid)
    np.testing.assert_array_equal(got, want)


def test_rows_that_are_not_valid_write_nothing():
    pool, kv = make_pool(), make_kv(2)
    got = write_tokens(jnp.asarray(pool), kv, np.zeros((2, 3), np.int32), np.array([0, 7]), np.zeros(2, bool))
    np.testing.assert_array_equal(got, pool)


def test_a_chunk_is_written_page_by_page():
    pool, kv = make_pool(), make_kv(3 * PAGE)
    table = np.array([8, 3, 5, 1, 0, 0, 0, 0], np.int32)
    want = pool.copy()
    want[3], want[5], want[1] = kv.reshape(3, PAGE, KV2, DIM)
    got = jax.jit(write_pages)(pool, kv, table, np.int32(PAGE), np.int32(3 * PAGE))
    np.testing.assert_array_equal(got, want)


def test_pages_past_a_chunk_s_tokens_are_not_touched():
    pool, kv = make_pool(), make_kv(3 * PAGE)
    table = np.array([8, 3, 5, 1, 0, 0], np.int32)
    for num_tokens in range(3 * PAGE + 1):
        got = np.asarray(write_pages(jnp.asarray(pool), kv, table, np.int32(PAGE), np.int32(num_tokens)))
        num_pages = -(-num_tokens // PAGE)
        for index, page in enumerate(table[1:4]):
            real = slice(0, min(PAGE, max(0, num_tokens - index * PAGE)))
            np.testing.assert_array_equal(got[page, real], kv.reshape(3, PAGE, KV2, DIM)[index, real])
            if index >= num_pages:
                np.testing.assert_array_equal(got[page], pool[page])
        untouched = [page for page in range(9) if page not in table[1:4]]
        np.testing.assert_array_equal(got[untouched], pool[untouched])


def test_writing_keeps_the_pool_s_dtype():
    pool = jnp.asarray(make_pool(), jnp.bfloat16)
    kv = make_kv(2)
    got = write_tokens(pool, kv, np.array([[1], [2]], np.int32), np.array([0, 1]), np.ones(2, bool))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[1, 0], kv[0].astype(jnp.bfloat16))
