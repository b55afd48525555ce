"""A CPU's whole layer in one call: the same model as its pieces, and bits that are a token's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllama import make_mesh
from jaxllama.decode.state import Chunk, Place, make_pool
from jaxllama.decode.steps import prefill_logits
from jaxllama.errors import ConfigError
from jaxllama.model import native
from jaxllama.model.cache import KVPool
from jaxllama.model.native import PackedWeight
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.model.rope import rotary_angles
from jaxllama.weights.forms import fit

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(not native.is_available(), reason="needs AVX2 or NEON, and a C++ compiler"),
]
CASES = [
    ("divisible", "float32", "float32", None, 0),
    ("divisible", "float32", "int8", None, 0),
    ("smollm2_like", "bfloat16", "bfloat16", None, 0),
    ("smollm2_like", "bfloat16", "int8", "int8", 0),
    ("divisible", "float32", "float32", None, 5),
]
PAGE_SIZE, NUM_PAGES = 4, 49


class Model:
    """One layer of a tiny model, with a pool of random keys and values."""

    def __init__(self, name: str, dtype: str, kv_dtype: str, quantize: str | None, window: int) -> None:
        config = tiny.config_of(name)
        self.config = dataclasses.replace(config, windows=(window,) * config.num_layers)
        self.mesh = make_mesh(self.config, tp=1, devices=jax.devices()[:1])
        self.platform = describe_platform(self.config, self.mesh, dtype=dtype, kv_dtype=kv_dtype)
        params = tiny.make_params(self.config, tiny.weights_of(name), self.mesh, jnp.dtype(dtype), quantize)
        self.params = fit(params, self.platform)
        self.kv_dtype = jnp.dtype(kv_dtype)

    def pool(self) -> KVPool:
        sizes: dict[str, Any] = {"num_pages": NUM_PAGES, "page_size": PAGE_SIZE, "dtype": self.kv_dtype}
        return make_pool(self.config, self.mesh, **sizes)

    def layer(
        self,
        x: jax.Array,
        pool: KVPool,
        table: jax.Array,
        positions: jax.Array,
        written: jax.Array,
        first_page: int = 0,
    ) -> tuple[jax.Array, KVPool]:
        angles = tuple(part[:, :, 0] for part in rotary_angles(self.config, positions))
        config, weights = self.config, self.params["layers"][0]
        sizes = {"heads": config.num_heads, "ffn": config.intermediate_size, "epsilon": config.rms_norm_eps}
        sizes["window"] = config.window(0)
        return native.run_layer(x, weights, pool, table, np.int32(first_page), positions, written, angles, **sizes)

    def random(self, *shape: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(3).standard_normal((*shape, self.config.hidden_size)), jnp.float32)


@pytest.fixture(params=CASES, ids=["-".join(map(str, case)) for case in CASES], scope="module")
def model(request):
    return Model(*request.param)


TABLE = jnp.asarray(1 + np.arange(48).reshape(4, 12), jnp.int32)


def test_logits_are_those_of_the_pieces(model):
    assert model.platform.has_layer_kernel
    pieces = dataclasses.replace(model.platform, has_layer_kernel=False)
    tokens = np.array(tiny.prompt_of("divisible", 24), np.int32)
    place = Place(TABLE[1], np.int32(0))
    got, want = [], []
    for to, platform in ((got, model.platform), (want, pieces)):
        pool = model.pool()
        for start, num in ((0, 24), (24, 20)):
            chunk = Chunk(tokens, np.int32(start), np.int32(num))
            logits, pool = prefill_logits(model.config, model.params, pool, place, chunk, platform=platform)
            to.append(np.asarray(logits[:num]))
    # Norms add up in another order: in bfloat16 a value between two roundings may take the other.
    tolerance = 1e-4 if model.platform.attention and model.params["norm"].dtype == jnp.float32 else 0.06
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=tolerance * np.abs(theirs).max())


def test_what_is_not_packed_or_of_another_shape_is_refused(model, monkeypatch):
    """The kernel would read past its end."""
    x, positions = model.random(1, 1), jnp.zeros((1, 1), jnp.int32)
    layer = model.params["layers"][0]
    plain = jnp.zeros((layer["q_proj"].num_outputs, layer["q_proj"].num_inputs))
    for name, weight, said in (
        ("q_proj", plain, "q_proj is not packed"),
        ("up_proj", layer["down_proj"], "up_proj has the shape"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(layer, name, weight)
            with pytest.raises(ConfigError, match=said):
                model.layer(x, model.pool(), TABLE[:1], positions, jnp.ones(1, jnp.int32))
    with pytest.raises(ConfigError, match="cannot be multiplied with weights of"):
        native.multiply(x[..., 1:], layer["up_proj"])


def test_a_layer_s_pages_begin_where_it_is_told(model):
    x, positions = model.random(1, 24), jnp.arange(24, dtype=jnp.int32)[None]
    count, table = jnp.array([24], jnp.int32), TABLE[:1]
    out, pool = model.layer(x, model.pool(), table, positions, count, first_page=30)
    want, shifted = model.layer(x, model.pool(), table + 30, positions, count)
    np.testing.assert_array_equal(out, want)
    jax.tree.map(np.testing.assert_array_equal, pool, shifted)


def test_a_token_s_bits_depend_on_nothing_beside_it(model):
    x = model.random(1, 24)
    positions = jnp.arange(24, dtype=jnp.int32)[None]
    whole, pool = model.layer(x, model.pool(), TABLE[:1], positions, jnp.array([24], jnp.int32))
    cut = model.pool()
    for first, last in ((0, 7), (7, 8), (8, 21), (21, 24)):
        count = jnp.array([last - first], jnp.int32)
        part, cut = model.layer(x[:, first:last], cut, TABLE[:1], positions[:, first:last], count)
        np.testing.assert_array_equal(part, whole[:, first:last])
    jax.tree.map(np.testing.assert_array_equal, cut, pool)
    # Rows of one token each beside others, and one that takes no part.
    rows = jnp.concatenate([x[:, 23], x[:, 5], x[:, 0], x[:, 9]])[:, None]
    at = jnp.array([[23], [0], [17], [0]], jnp.int32)
    alone, _ = model.layer(rows[:1], jax.tree.map(jnp.copy, pool), TABLE[:1], at[:1], jnp.array([1], jnp.int32))
    beside, after = model.layer(rows, jax.tree.map(jnp.copy, pool), TABLE, at, jnp.array([1, 1, 0, 1], jnp.int32))
    np.testing.assert_array_equal(alone[0, 0], whole[0, 23])
    np.testing.assert_array_equal(beside[0], alone[0])
    np.testing.assert_array_equal(beside[2], 0)
    heads_first = pool.heads_first
    untouched = np.asarray(TABLE[2])
    np.testing.assert_array_equal(after.pages[untouched], pool.pages[untouched])
    assert (np.asarray(after.pages[TABLE[1, 0]][:, 0] if heads_first else after.pages[TABLE[1, 0], 0]) != 0).any()


def test_tokens_past_those_that_count_are_neither_computed_nor_written(model):
    x = model.random(2, 8)
    positions = jnp.minimum(jnp.arange(8), jnp.array([[4], [2]])).astype(jnp.int32)
    few, pool = model.layer(x, model.pool(), TABLE[:2], positions, jnp.array([5, 3], jnp.int32))
    np.testing.assert_array_equal(few[:, 5:], 0)
    for row, count in ((0, 5), (1, 3)):
        one = slice(row, row + 1)
        alone, _ = model.layer(
            x[one, :count], model.pool(), TABLE[one], positions[one, :count], jnp.array([count], jnp.int32)
        )
        np.testing.assert_array_equal(alone[0], few[row, :count])
    slot = (TABLE[1, 0], slice(None), 3) if pool.heads_first else (TABLE[1, 0], 3)
    assert (np.asarray(pool.pages[slot]) == 0).all()


def test_nan_stays_in_its_row(model):
    x = model.random(3, 1).at[1, 0, 5].set(np.nan)
    positions, written = jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32)
    out, _ = model.layer(x, model.pool(), TABLE[:3], positions, written)
    assert np.isfinite(out[0]).all()
    assert np.isfinite(out[2]).all()
    assert np.isnan(out[1]).all()


def test_a_query_without_pages_is_refused(model):
    x = model.random(1, 1)
    with pytest.raises(Exception, match=r"row 0 has a query at position 48, and pages for 48 tokens"):
        jax.block_until_ready(
            model.layer(x, model.pool(), TABLE[:1], jnp.full((1, 1), 48, jnp.int32), jnp.ones(1, jnp.int32))
        )


def test_weights_are_packed(model):
    assert all(isinstance(model.params["layers"][0][name], PackedWeight) for name in native.LAYER_WEIGHTS)
