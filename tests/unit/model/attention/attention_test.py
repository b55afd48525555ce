"""Paged attention is exact attention over a row's own tokens, whoever else is in the batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, Case, Inputs, exact, make_inputs, poisoned

from jaxllama.model.attention.reference import ReferenceAttention, paged_attention
from jaxllama.model.cache import KVPool
from jaxllama.model.platforms.cpu import PLAIN

pytestmark = pytest.mark.optimized


@jax.jit
def attend(q, pages, table, positions, scales=None):
    """`pages` [pages, page_size, 2K, D] and `scales` [pages, page_size, 2K], whatever a pool's layout."""
    if scales is not None:
        pages, scales = pages.swapaxes(1, 2), scales.swapaxes(1, 2)
    return paged_attention(q, KVPool(pages, scales), table, positions)


def run(x: Inputs) -> np.ndarray:
    return np.asarray(attend(x.q, x.pool, x.table, x.positions, x.scales))


@pytest.mark.parametrize("name", CASES)
def test_attention_is_exact(name):
    case = CASES[name]
    x = make_inputs(case)
    np.testing.assert_allclose(run(x), exact(case, x), atol=3e-5)


def test_a_lone_token_attends_to_itself():
    x = make_inputs(Case(4, 2, 6, 4, (1, 1)))
    want = np.repeat(np.stack([v[0] for v in x.v]), 2, axis=1)[:, None]
    np.testing.assert_allclose(run(x), want, rtol=1e-6)


def test_large_scores_do_not_overflow():
    case = CASES["grouped"]
    x = make_inputs(case)
    x.q[:] *= 1e4
    got = run(x)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, exact(case, x), atol=1e-3)


def test_a_row_s_bits_do_not_depend_on_the_others():
    case = CASES["long"]
    x = make_inputs(case)
    together = run(x)
    for row in range(len(case.lengths)):
        for other in range(len(case.lengths)):
            rows = [row, other]
            apart = attend(x.q[rows], x.pool, x.table[rows], x.positions[rows])
            np.testing.assert_array_equal(np.asarray(apart)[0], together[row])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_of_two_rows_attends_alone_with_the_same_bits(dtype):
    """The smallest decode program takes two rows, of which one is often nobody's."""
    case = Case(9, 3, 64, 16, (1500, 700), tokens=1)
    x = make_inputs(case, rounded=True)
    rng = np.random.default_rng(1)
    kv = jnp.asarray(rng.standard_normal((2, 6, 64)), dtype)
    pool, q = KVPool(jnp.asarray(x.pool, dtype), None), jnp.asarray(x.q[:, 0], dtype)
    decode = jax.jit(ReferenceAttention().decode, compiler_options=dict(PLAIN.compiler_options))

    def outputs(*active: bool) -> np.ndarray:
        return np.asarray(decode(q, kv, pool, x.table, x.positions[:, 0], jnp.asarray(active))[0], np.float32)

    both = outputs(True, True)
    for row in range(2):
        np.testing.assert_array_equal(outputs(row == 0, row == 1)[row], both[row])


def test_a_row_s_bits_do_not_depend_on_where_its_pages_lie():
    case = CASES["grouped"]
    x = make_inputs(case)
    order = np.random.default_rng(5).permutation(len(x.pool))
    pool, table = np.empty_like(x.pool), order[x.table].astype(np.int32)
    pool[order] = x.pool
    np.testing.assert_array_equal(run(x), np.asarray(attend(x.q, pool, table, x.positions)))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["grouped", "chunk", "long"])
def test_what_stands_after_a_row_never_reaches_it(name, poison):
    """Pages are reused without being cleared, and a failed row leaves NaN in them."""
    case = CASES[name]
    x = make_inputs(case)
    clean = run(x)
    pool = poisoned(case, x, poison)
    np.testing.assert_array_equal(np.asarray(attend(x.q, pool, x.table, x.positions)), clean)


def test_bfloat16_sums_in_float32():
    """The inputs are bfloat16 numbers: what remains is the rounding of probabilities and of the result."""
    case = Case(4, 2, 16, 16, (1000,))
    x = make_inputs(case, rounded=True)
    got = attend(*(jnp.asarray(a, jnp.bfloat16) for a in (x.q, x.pool)), x.table, x.positions)
    assert got.dtype == jnp.bfloat16
    # Measured: 9e-4, half a unit in the last place of the largest results.
    np.testing.assert_allclose(np.asarray(got, np.float32), exact(case, x), atol=1.2e-3)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_bfloat16_chunks_and_single_queries_of_long_rows_agree_in_every_bit(kv_dtype):
    """The prefix cache rests on it (`Platform.programs_agree`): chunks of any size at any start, and one query at
    a time among any number of rows, each of which walks the blocks in another way. Sizes of SmolLM2-135M."""
    case = Case(9, 3, 64, 16, (2100,), tokens=1024)
    x = make_int8_inputs(case) if kv_dtype == "int8" else make_inputs(case, rounded=True)
    pages = jnp.asarray(x.pool, kv_dtype)
    pool = KVPool(pages.swapaxes(1, 2), x.scales.swapaxes(1, 2)) if x.scales is not None else KVPool(pages, None)
    compiled = jax.jit(paged_attention, compiler_options=dict(PLAIN.compiler_options))

    def run_as(rows: int, tokens: int, at: int) -> np.ndarray:
        """Queries `at … at + rows × tokens` as so many rows of so many tokens."""
        q = x.q[0, at : at + rows * tokens].reshape(rows, tokens, *x.q.shape[2:])
        positions = x.positions[0, at : at + rows * tokens].reshape(rows, tokens)
        out = compiled(jnp.asarray(q, jnp.bfloat16), pool, np.repeat(x.table, rows, 0), positions)
        return np.asarray(out, np.float32).reshape(rows * tokens, -1)

    want = np.concatenate([run_as(1, 512, 0), run_as(1, 512, 512)])
    for rows, tokens, at in (
        (1, 1024, 0),
        (1, 32, 48),
        (1, 128, 80),
        (1, 512, 208),
        (1, 1, 30),
        (1, 1, 1000),
        (2, 1, 61),
        (4, 1, 200),
        (32, 1, 971),
    ):
        np.testing.assert_array_equal(run_as(rows, tokens, at), want[at : at + rows * tokens], f"{rows} × {tokens}")


# ---- int8 ----


def make_int8_inputs(case: Case) -> Inputs:
    """Integers with scales that differ by token and head; `k` and `v` are what they stand for."""
    x = make_inputs(case)
    rng = np.random.default_rng(1)
    pages = rng.integers(-127, 128, x.pool.shape).astype(np.int8)
    scales = (rng.uniform(0.2, 2, x.pool.shape[:3]) / 127).astype(np.float32)
    numbers = pages.astype(np.float64) * scales[..., None]
    ks, vs = [], []
    for row, length in enumerate(case.lengths):
        where = np.arange(length)
        tokens = numbers[x.table[row, where // case.page_size], where % case.page_size]
        ks.append(tokens[:, 0::2])
        vs.append(tokens[:, 1::2])
    return dataclasses.replace(x, pool=pages, scales=scales, k=ks, v=vs)


@pytest.mark.parametrize("name", CASES)
def test_int8_is_exact_for_the_numbers_it_stands_for(name):
    case = CASES[name]
    x = make_int8_inputs(case)
    np.testing.assert_allclose(run(x), exact(case, x), atol=3e-5)


def test_int8_a_row_s_bits_do_not_depend_on_the_others():
    x = make_int8_inputs(CASES["long"])
    together = run(x)
    for row in range(len(x.table)):
        apart = attend(x.q[[row, 0]], x.pool, x.table[[row, 0]], x.positions[[row, 0]], x.scales)
        np.testing.assert_array_equal(np.asarray(apart)[0], together[row])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["grouped", "chunk", "long"])
def test_int8_scales_after_a_row_never_reach_it(name, poison):
    case = CASES[name]
    x = make_int8_inputs(case)
    assert x.scales is not None
    scales = np.full_like(x.scales, poison)
    for row, length in enumerate(case.lengths):
        for position in range(length):
            page, slot = x.table[row, position // case.page_size], position % case.page_size
            scales[page, slot] = x.scales[page, slot]
    np.testing.assert_array_equal(run(dataclasses.replace(x, scales=scales)), run(x))


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("position", [0, 20, 39])
def test_int8_a_nan_scale_fails_its_row_and_no_other(part, position):
    """The finite check of the logits must see what the integers cannot hold."""
    case = CASES["grouped"]
    x = make_int8_inputs(case)
    assert x.scales is not None
    clean, scales = run(x), x.scales.copy()
    scales[x.table[3, position // case.page_size], position % case.page_size, part] = np.nan
    got = run(dataclasses.replace(x, scales=scales))
    assert np.isnan(got[3, 0, :3]).all()
    np.testing.assert_array_equal(got[3, 0, 3:], clean[3, 0, 3:])
    np.testing.assert_array_equal(got[:3], clean[:3])


def test_int8_under_bfloat16_queries_rounds_probabilities_and_results_only():
    case = Case(4, 2, 16, 16, (1000,))
    x = make_int8_inputs(case)
    x.q[:] = x.q.astype(jnp.bfloat16).astype(np.float32)
    got = attend(jnp.asarray(x.q, jnp.bfloat16), x.pool, x.table, x.positions, x.scales)
    assert got.dtype == jnp.bfloat16
    # The integers are exact in bfloat16. Measured: 1.5e-3, most of a unit in the last place.
    np.testing.assert_allclose(np.asarray(got, np.float32), exact(case, x), atol=2e-3)
