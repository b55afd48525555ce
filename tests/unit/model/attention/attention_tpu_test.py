"""The TPU kernels, in Pallas's interpreter, do what the reference does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllama import EngineOptions, Llama, SamplingParams
from jaxllama.errors import ConfigError, NonFiniteLogitsError
from jaxllama.model import native
from jaxllama.model.attention import ReferenceAttention
from jaxllama.model.attention.tpu import TpuAttention
from jaxllama.model.attention.tpu_int8 import Int8TpuAttention
from jaxllama.model.cache import HeadLayout, KVPool
from jaxllama.model.config import LlamaConfig
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms import tpu
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.weights.forms import pack

pytestmark = pytest.mark.optimized

pytest.importorskip("flywheel_tpu")

LAYERS = 2
REFERENCE = ReferenceAttention()
# Both round probabilities to bfloat16, at other points: a few units in the last place of outputs near 1.
TOLERANCE = 0.04


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    page_size: int
    lengths: tuple[int, ...]
    kv_dtype: str = "bfloat16"
    head_dim: int = 128
    window: int | None = None


def config_of(case: Case) -> LlamaConfig:
    changes = {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "head_dim": case.head_dim}
    return tiny.config_of("divisible", num_hidden_layers=LAYERS, **changes)


def layout_of(case: Case) -> HeadLayout:
    return HeadLayout.in_lanes(config_of(case), 1)


def packed(case: Case, pool: KVPool) -> KVPool:
    """What the kernels keep where the reference keeps `pool`."""
    layout = layout_of(case)
    if pool.scales is None:
        return KVPool(layout.pack(pool.pages), None)
    scales = layout.pack_scales(pool.scales.swapaxes(1, 2)).swapaxes(1, 2)
    return KVPool(layout.pack(pool.pages.swapaxes(1, 2)).swapaxes(1, 2), scales)


def random_lengths(rng: np.random.Generator, count: int, most: int) -> tuple[int, ...]:
    """Spread over all magnitudes, as prompts are."""
    return tuple(int(n) for n in np.exp(rng.uniform(0, np.log(most), count)).astype(int) + 1)


class Inputs:
    """Pages of every row scattered over the second layer's part of a pool.

    Slots past a row's end hold 10,000; in int8, where anything may be there, a scale of NaN.
    """

    def __init__(self, case: Case, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.width = max(-(-length // case.page_size) for length in case.lengths) + 1
        counts = [-(-length // case.page_size) for length in case.lengths]
        self.pages_per_layer = 1 + sum(counts)
        shape = (LAYERS * self.pages_per_layer, case.page_size, 2 * case.kv_heads, case.head_dim)
        pool = rng.standard_normal(shape)
        order = rng.permutation(np.arange(1, self.pages_per_layer))
        self.table = np.zeros((len(case.lengths), self.width), np.int32)
        for row, (length, count) in enumerate(zip(case.lengths, counts, strict=True)):
            self.table[row, :count], order = order[:count], order[count:]
            for position in range(length, count * case.page_size):
                page = self.table[row, position // case.page_size] + self.pages_per_layer
                pool[page, position % case.page_size] = 1e4
        self.pool = KVPool(jnp.asarray(pool, jnp.bfloat16), None)
        if case.kv_dtype == "int8":
            values, scales = quantize_rows(pool.swapaxes(1, 2))
            self.pool = KVPool(jnp.asarray(values), jnp.asarray(np.where(scales > 10, np.nan, scales)))
        self.table += self.pages_per_layer

    def array(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape), jnp.bfloat16)


def kernel_of(case: Case, config: LlamaConfig) -> TpuAttention:
    kind = Int8TpuAttention if case.kv_dtype == "int8" else TpuAttention
    return kind(config.num_layers, interpret=True, layout=layout_of(case))


def assert_near(got: jax.Array, want: jax.Array) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=TOLERANCE)


RNG = np.random.default_rng(7)
# The interpreter takes half a minute a case: the others are slow tests.
DECODE = [
    Case(8, 1, 128, (1, 2, 127, 128, 129, 300, 700)),
    Case(8, 2, 128, (1, 2, 127, 128, 129, 512, 513, 1100), kv_dtype="int8"),
    # Two heads in a row, and one with a row for itself.
    Case(6, 3, 128, (1, 128, 300), head_dim=64),
    Case(6, 3, 128, (1, 128, 300), "int8", head_dim=64),
    Case(4, 1, 128, (1100, 5, 130), kv_dtype="int8", window=200),
    Case(4, 1, 128, (1100, 5, 130), window=200),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case(4, 4, 128, random_lengths(RNG, 5, 600)),
            Case(6, 2, 256, random_lengths(RNG, 4, 900)),
            Case(8, 1, 128, (8192, 1, 4097)),
            *(Case(8, 2, 128, random_lengths(RNG, 6, 8192)) for _ in range(3)),
            Case(8, 8, 256, (8192, 1, 4097, 5), kv_dtype="int8"),
            *(Case(6, 2, 128, random_lengths(RNG, 6, 8192), kv_dtype="int8") for _ in range(3)),
            Case(32, 8, 128, random_lengths(RNG, 5, 2000), head_dim=64),
            Case(32, 8, 128, random_lengths(RNG, 5, 2000), "int8", head_dim=64),
            Case(8, 8, 128, random_lengths(RNG, 5, 900), head_dim=32),
            Case(4, 1, 128, random_lengths(RNG, 5, 900), head_dim=64),
            Case(8, 2, 128, random_lengths(RNG, 5, 900), head_dim=96),
            Case(8, 2, 128, random_lengths(RNG, 5, 900), "int8", head_dim=80),
            Case(4, 2, 128, random_lengths(RNG, 5, 900), head_dim=160),
        )
    ),
]


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_writes_and_attends_as_the_reference(case):
    config, inputs = config_of(case), Inputs(case, seed=len(case.lengths))
    kernel = kernel_of(case, config)
    rows = len(case.lengths)
    q, kv = inputs.array(rows, case.heads, case.head_dim), inputs.array(rows, 2 * case.kv_heads, case.head_dim)
    positions = jnp.asarray(case.lengths, jnp.int32) - 1
    active = jnp.asarray([row != 1 for row in range(rows)])
    where = (jnp.asarray(inputs.table), positions, active)
    want, want_pool = jax.jit(partial(REFERENCE.decode, window=case.window))(q, kv, inputs.pool, *where)
    got, got_pool = jax.jit(partial(kernel.decode, window=case.window))(q, kv, packed(case, inputs.pool), *where)
    is_active = np.asarray(active)
    assert_near(got[is_active], want[is_active])
    want_pool = packed(case, want_pool)
    given = np.ones(len(got_pool.pages), bool)
    given[inputs.pages_per_layer] = False  # the second layer's page 0 takes what inactive rows write
    for part, want_part in zip(jax.tree.leaves(got_pool), jax.tree.leaves(want_pool), strict=True):
        np.testing.assert_array_equal(np.asarray(part)[given], np.asarray(want_part)[given])


@pytest.mark.parametrize(
    ("case", "size", "start", "num_tokens"),
    [
        (Case(4, 2, 128, (301,)), 256, 128, 173),
        (Case(4, 2, 128, (301,), kv_dtype="int8"), 256, 128, 173),
        (Case(4, 2, 128, (301,), window=50), 256, 128, 173),
        (Case(4, 2, 128, (813,), "int8", window=50), 256, 640, 173),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                (Case(8, 1, 128, (128,)), 128, 0, 128),
                (Case(4, 2, 128, (640,)), 128, 512, 1),
                (Case(16, 8, 128, (384,)), 128, 256, 100),
                (Case(16, 8, 128, (384,), kv_dtype="int8"), 128, 256, 100),
                (Case(6, 3, 128, (301,), head_dim=64), 256, 128, 173),
                (Case(6, 3, 128, (301,), "int8", head_dim=64), 256, 128, 173),
                (Case(4, 2, 128, (301,), head_dim=80), 256, 128, 173),
            )
        ),
    ],
    ids=str,
)
def test_prefill_writes_and_attends_as_the_reference(case, size, start, num_tokens):
    config, inputs = config_of(case), Inputs(case, seed=size)
    kernel = kernel_of(case, config)
    q, kv = inputs.array(size, case.heads, case.head_dim), inputs.array(size, 2 * case.kv_heads, case.head_dim)
    table = np.pad(inputs.table[0], (0, size // case.page_size))
    where = (jnp.asarray(table), jnp.int32(start), jnp.int32(num_tokens))
    want, want_pool = jax.jit(partial(REFERENCE.prefill, window=case.window))(q, kv, inputs.pool, *where)
    got, got_pool = jax.jit(partial(kernel.prefill, window=case.window))(q, kv, packed(case, inputs.pool), *where)
    assert_near(got[:num_tokens], want[:num_tokens])
    want_pool = packed(case, want_pool)
    for part, want_part in zip(jax.tree.leaves(got_pool), jax.tree.leaves(want_pool), strict=True):
        got_part, want_part = np.asarray(part), np.asarray(want_part)
        for position in range(start + num_tokens):
            page, slot = table[position // case.page_size], position % case.page_size
            at = (page, slot) if case.kv_dtype == "bfloat16" else (page, slice(None), slot)
            np.testing.assert_array_equal(got_part[at], want_part[at])


def test_pairs_that_are_kept_write_and_attend_alike():
    """`TpuAttention.keeps_pairs` is the same computation to XLA in other words."""
    case = Case(4, 2, 128, (1, 130, 300))
    config, inputs = config_of(case), Inputs(case, seed=5)
    q, kv = inputs.array(3, 4, 128), inputs.array(3, 4, 128)
    where = (jnp.asarray(inputs.table), jnp.asarray(case.lengths, jnp.int32) - 1, jnp.array([True, False, True]))
    apart = kernel_of(case, config)
    kept = dataclasses.replace(apart, keeps_pairs=True)
    got, want = (jax.jit(kernel.decode)(q, kv, packed(case, inputs.pool), *where) for kernel in (kept, apart))
    for part, want_part in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(want_part))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_rows_do_not_see_each_other(kv_dtype):
    case = Case(8, 1, 128, (1, 300, 17, 129), kv_dtype=kv_dtype)
    config, inputs = config_of(case), Inputs(case, seed=3)
    decode = jax.jit(kernel_of(case, config).decode)
    q, kv = inputs.array(4, 8, 128), inputs.array(4, 2, 128)
    positions = jnp.asarray(case.lengths, jnp.int32) - 1
    together, _ = decode(q, kv, inputs.pool, jnp.asarray(inputs.table), positions, jnp.ones(4, bool))
    for row in range(4):
        alone = jnp.arange(4) == row
        got, _ = decode(q, kv, inputs.pool, jnp.asarray(inputs.table), positions, alone)
        np.testing.assert_array_equal(np.asarray(got[row]), np.asarray(together[row]))


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_reference(monkeypatch):
    config = config_of(Case(8, 1, 128, (1,)))
    kernel = TpuAttention(config.num_layers)
    with pytest.raises(ConfigError, match="page_size must be a multiple of 128"):
        kernel.validate(page_size=16, num_rows=1, table_width=1)
    with pytest.raises(ConfigError, match="64 rows × 4096 pages"):
        kernel.validate(page_size=128, num_rows=64, table_width=4096)
    kernel.validate(page_size=128, num_rows=64, table_width=2048)
    windowed = dataclasses.replace(config, windows=(64,) * config.num_layers)
    wide = config_of(Case(2, 1, 128, (1,), head_dim=288))
    for model, kv_dtype in ((config, "float32"), (wide, "int8")):
        assert tpu.head_layout(model, kv_dtype, 1) is None
    assert tpu.head_layout(windowed, "bfloat16", 1) is not None
    monkeypatch.setattr(native, "is_available", lambda: False)
    assert describe_platform(config, make_mesh(config, tp=1), dtype=jnp.bfloat16).kernel == ReferenceAttention()


@pytest.mark.parametrize(("kv_dtype", "head_dim"), [(None, 128), ("int8", 128), (None, 64), ("int8", 64)])
def test_an_engine_on_the_kernels_generates_and_a_failed_row_poisons_nobody(kv_dtype, head_dim, monkeypatch):
    """Three pages in all: every request gets the pages of the one before it."""
    hf = tiny.MODELS["divisible"] | {
        "num_attention_heads": 2,
        "num_key_value_heads": 128 // head_dim,
        "head_dim": head_dim,
    }
    hf["tie_word_embeddings"] = False
    config = LlamaConfig.from_hf(hf)
    weights, mesh = tiny.random_weights(hf, 2), make_mesh(config, tp=1)
    options = EngineOptions(
        max_rows=2, max_context=256, num_pages=4, page_size=128, chunk_sizes=(128,), kv_dtype=kv_dtype
    )
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 130]

    def outputs(model: Llama) -> list[tuple[int, ...]]:
        return [model.generate(ids, greedy).token_ids for ids in prompts]

    params = tiny.make_params(config, weights, mesh, jnp.bfloat16)
    with Llama(config, pack(params) if native.is_available() else params, mesh, options=options) as model:
        want = outputs(model)
    seen = {token_id for ids in (*want, *prompts) for token_id in ids}
    bad = next(token_id for token_id in range(config.vocab_size) if token_id not in seen)
    weights["model.embed_tokens.weight"][bad] = np.nan
    kind, layout = TpuAttention if kv_dtype is None else Int8TpuAttention, HeadLayout.in_lanes(config, 1)
    kernel = kind(config.num_layers, interpret=True, layout=layout)
    platform = tpu.with_kernel(kernel, mesh)
    monkeypatch.setattr("jaxllama.engine.engine.describe_checked", lambda *_, **__: platform)
    with Llama(config, tiny.make_params(config, weights, mesh, jnp.bfloat16), mesh, options=options) as model:
        assert outputs(model) == want
        with pytest.raises(NonFiniteLogitsError):
            model.generate([bad] * 130, greedy)
        assert outputs(model) == want
