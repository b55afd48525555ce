"""The CPU's kernels: exact products and attention, whose bits are a row's own, and a way on without them."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attention_cases import Case, Inputs, exact, make_inputs, poisoned

import jaxllama
from jaxllama import Checkpoint, EngineOptions, Llama, make_mesh
from jaxllama.model import native
from jaxllama.model.attention import ReferenceAttention
from jaxllama.model.attention.cpu import CpuAttention
from jaxllama.model.linear import Linear
from jaxllama.model.mesh import param_shardings
from jaxllama.model.params import PackedWeight, Params, get_param, param_specs
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.weights.checkpoint import restore_params
from jaxllama.weights.forms import fit, pack, unpack
from jaxllama.weights.loading import load_params

pytestmark = pytest.mark.optimized

has_bf16 = "avx512_bf16" in native._cpu().split() and shutil.which("c++") is not None
needs_kernels = pytest.mark.skipif(not has_bf16, reason="needs a CPU with AVX-512 BF16, and a C++ compiler")
bfloat16 = jnp.bfloat16


def packed(weight: jax.Array) -> PackedWeight:
    blocks = pack({"layers": [], "weight": weight})["weight"]
    assert isinstance(blocks, PackedWeight)
    return blocks


# ---- Products ----


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 64), (6, 192), (576, 576), (1536, 576), (576, 1536), (16, 4288)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 64])
def test_products_are_exact(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((n, inputs)), bfloat16) for n in (rows, outputs))
    [got] = native.multiply(x, packed(jnp.array(w)).blocks)
    assert got.dtype == jnp.float32
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    np.testing.assert_allclose(got, x @ w.T, atol=2e-6 * inputs**0.5 * 4)


@needs_kernels
def test_a_row_s_bits_do_not_depend_on_the_others():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((600, 576)), bfloat16)
    weight = packed(jnp.asarray(rng.standard_normal((192, 576)), bfloat16)).blocks
    together = np.asarray(native.multiply(x, weight)[0])
    for first, last in ((0, 1), (1, 3), (5, 11), (7, 20), (100, 133), (88, 600)):
        np.testing.assert_array_equal(native.multiply(x[first:last], weight)[0], together[first:last])
    [by_three] = native.multiply(x.reshape(3, 200, 576), weight)
    np.testing.assert_array_equal(by_three, together.reshape(3, 200, 192))


@needs_kernels
def test_several_weights_at_once():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((9, 96)), bfloat16)
    weights = [packed(jnp.asarray(rng.standard_normal((n, 96)), bfloat16)).blocks for n in (64, 4288, 192)]
    got = native.multiply(x, *weights)
    assert [y.shape for y in got] == [(9, 64), (9, 4288), (9, 192)]
    for y, weight in zip(got, weights, strict=True):
        np.testing.assert_array_equal(y, native.multiply(x, weight)[0])


@needs_kernels
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(poison):
    x = np.ones((7, 64), np.float32)
    weight = packed(jnp.ones((64, 64), bfloat16)).blocks
    x[3, 10] = poison
    got = np.asarray(native.multiply(jnp.asarray(x, bfloat16), weight)[0])
    np.testing.assert_array_equal(got[[0, 1, 2, 4, 5, 6]], 64)
    assert not np.isfinite(got[3]).any()


@needs_kernels
def test_packing_is_undone_and_rows_are_found():
    weight = jnp.arange(128 * 6, dtype=jnp.float32).reshape(128, 6).astype(bfloat16)
    blocks = packed(jnp.array(weight))
    np.testing.assert_array_equal(unpack(blocks), weight)
    ids = jnp.array([[0, 63], [64, 127]])
    np.testing.assert_array_equal(Linear({"embed": blocks}, "embed", jnp.float32).rows(ids), weight[ids])


@needs_kernels
def test_what_cannot_be_packed_stays():
    shapes = {"odd_inputs": (64, 7), "odd_outputs": (65, 8), "bias": (64,)}
    weights = {name: jnp.ones(shape, bfloat16) for name, shape in shapes.items()}
    params = pack({"layers": [dict(weights)], **weights})
    for kept in (params, *params["layers"]):
        assert {name: kept[name].shape for name in shapes} == shapes
    config = tiny.config_of("divisible")
    mesh, two = make_mesh(config, tp=1), make_mesh(config, tp=2)
    assert describe_platform(config, mesh, dtype=bfloat16).packs_weights
    for on, dtype in ((mesh, jnp.float32), (two, bfloat16)):
        platform = describe_platform(config, on, dtype=dtype)
        kept = fit({"layers": [], "weight": jnp.ones((64, 8))}, platform)
        assert isinstance(kept["weight"], jax.Array)


# ---- Attention ----

CASES = {
    "grouped": Case(6, 2, 64, 4, (1, 3, 17, 40)),
    "one_kv_head": Case(5, 1, 128, 8, (9, 33)),
    "as_many_kv_heads": Case(3, 3, 64, 16, (7, 2, 21)),
    "wide_group": Case(16, 2, 128, 16, (130, 600)),
    "chunk": Case(6, 2, 64, 4, (23, 9), tokens=9),
    "page_of_one": Case(4, 2, 64, 1, (5, 12)),
    "odd_page": Case(4, 2, 64, 7, (5, 300)),
    "long": Case(2, 1, 64, 16, (1100, 1, 256, 257, 512, 513, 2048), tokens=1),
    "long_chunk": Case(9, 3, 64, 16, (1700,), tokens=300),
    "chunk_of_one_token_a_task": Case(400, 2, 64, 16, (700,), tokens=3),
}
_attend = jax.jit(native.attend)


def attend(x: Inputs, pool: np.ndarray | None = None) -> np.ndarray:
    q, pages = (jnp.asarray(a, bfloat16) for a in (x.q, x.pool if pool is None else pool))
    return np.asarray(_attend(q, pages, x.table, x.positions), np.float32)


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_attention_is_exact(name):
    case = CASES[name]
    x = make_inputs(case, rounded=True)
    want = exact(case, x)
    # Half a unit in the last place of bfloat16 for the result, and as much for the probabilities.
    np.testing.assert_allclose(attend(x), want, atol=2e-3, rtol=2**-8)


@needs_kernels
def test_large_scores_do_not_overflow():
    case = CASES["long_chunk"]
    x = make_inputs(case, rounded=True)
    x = dataclasses.replace(x, q=np.asarray(jnp.asarray(x.q * 1e4, bfloat16), np.float32))
    got = attend(x)
    np.testing.assert_allclose(got, exact(case, x), atol=2e-3, rtol=2**-8)


@needs_kernels
def test_a_query_s_bits_do_not_depend_on_the_others():
    x = make_inputs(CASES["long"], rounded=True)
    together = attend(x)
    for row in range(len(x.table)):
        rows = [row, (row + 3) % len(x.table)]
        apart = dataclasses.replace(x, q=x.q[rows], table=x.table[rows], positions=x.positions[rows])
        np.testing.assert_array_equal(attend(apart)[0], together[row])


@needs_kernels
def test_chunks_and_single_queries_agree_in_every_bit():
    """The prefix cache rests on it (`Platform.programs_agree`)."""
    x = make_inputs(Case(9, 3, 64, 16, (2100,), tokens=1024), rounded=True)

    def run_as(rows: int, tokens: int, at: int) -> np.ndarray:
        q = x.q[0, at : at + rows * tokens].reshape(rows, tokens, *x.q.shape[2:])
        positions = x.positions[0, at : at + rows * tokens].reshape(rows, tokens)
        out = attend(dataclasses.replace(x, q=q, table=np.repeat(x.table, rows, 0), positions=positions))
        return out.reshape(rows * tokens, -1)

    want = run_as(1, 1024, 0)
    for rows, tokens, at in ((1, 512, 208), (1, 128, 80), (1, 32, 48), (1, 2, 5), (2, 1, 61), (32, 1, 971), (1, 1, 30)):
        np.testing.assert_array_equal(run_as(rows, tokens, at), want[at : at + rows * tokens], f"{rows} × {tokens}")


@needs_kernels
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["grouped", "chunk", "long"])
def test_what_stands_after_a_row_never_reaches_it(name, poison):
    case = CASES[name]
    x = make_inputs(case, rounded=True)
    np.testing.assert_array_equal(attend(x, poisoned(case, x, poison)), attend(x))


@needs_kernels
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("position", [0, 20, 39])
def test_a_nan_fails_its_row_and_no_other(part, position):
    """The finite check of the logits must see it."""
    case = CASES["grouped"]
    x = make_inputs(case, rounded=True)
    clean, pool = attend(x), x.pool.copy()
    pool[x.table[3, position // case.page_size], position % case.page_size, part] = np.nan
    got = attend(x, pool)
    assert np.isnan(got[3, 0, :3]).all()
    np.testing.assert_array_equal(got[3, 0, 3:], clean[3, 0, 3:])
    np.testing.assert_array_equal(got[:3], clean[:3])


@needs_kernels
@pytest.mark.parametrize("position", [-1, 160])
def test_a_position_without_a_page_is_an_error(position):
    case = Case(6, 2, 64, 16, (40, 128))
    x = make_inputs(case, rounded=True)
    x.positions[1] = position
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"row 1 .* at position {position}, and pages for 160 tokens"):
        attend(x)


@needs_kernels
def test_attention_is_chosen_where_it_runs():
    config = tiny.config_of("smollm2_like")
    mesh, two = make_mesh(config, tp=1), make_mesh(config, tp=1, data=2)
    assert describe_platform(config, mesh, dtype=bfloat16).kernel == CpuAttention()
    for other in (
        describe_platform(config, mesh, dtype=bfloat16, kv_dtype=jnp.float32),
        describe_platform(config, mesh, dtype=jnp.float32, kv_dtype=bfloat16),
        describe_platform(config, mesh, dtype=bfloat16, kv_dtype=jnp.int8),
        describe_platform(config, two, dtype=bfloat16),
        describe_platform(tiny.config_of("divisible"), mesh, dtype=bfloat16),
    ):
        assert type(other.kernel) is ReferenceAttention


# ---- Models ----


@needs_kernels
def test_a_model_answers_as_through_xla(tmp_path, monkeypatch):
    """Loaded with kernels and without: nearly equal log-probabilities; and what is saved is what was loaded."""
    config = tiny.config_of("smollm2_like", vocab_size=1088)
    weights = dict(tiny.weights_of("smollm2_like"))
    embeddings = np.random.default_rng(2).normal(0, 0.1, (1088, config.hidden_size)).astype(np.float32)
    weights["model.embed_tokens.weight"] = embeddings
    path = tiny.write_checkpoint(tmp_path / "model", "smollm2_like", weights, vocab_size=1088)
    checkpoint, mesh = Checkpoint.open(path), make_mesh(config, tp=1)
    prompt = tiny.prompt_of("smollm2_like", 70)

    def logprobs(params: Params) -> list[float]:
        with Llama(config, params, mesh, options=EngineOptions(max_rows=2, max_context=128)) as llama:
            return [token.logprob for token in llama.prompt_logprobs(prompt)]

    with_kernels = load_params(checkpoint, mesh, bfloat16)
    assert isinstance(with_kernels["layers"][1]["down_proj"], PackedWeight)
    assert isinstance(with_kernels["embed_tokens"], PackedWeight)
    got = logprobs(with_kernels)
    monkeypatch.setattr(native, "is_available", lambda: False)
    without = load_params(checkpoint, mesh, bfloat16)
    for spec in param_specs(config):
        want = get_param(without, spec)
        assert isinstance(want, jax.Array)
        np.testing.assert_array_equal(unpack(get_param(with_kernels, spec)), want)
    assert len(got) == 69
    np.testing.assert_allclose(got, logprobs(without), atol=0.02)


@needs_kernels
def test_what_is_saved_is_what_was_loaded(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "model", "smollm2_like")
    mesh = make_mesh(tiny.config_of("smollm2_like"), tp=1)
    with jaxllama.load(path, mesh, dtype="bfloat16") as llama:
        assert isinstance(llama.params["layers"][0]["q_proj"], PackedWeight)
        llama.save(tmp_path / "saved")
        config = llama.config
    shardings = param_shardings(config, mesh)
    want, got = (restore_params(Checkpoint.open(p), bfloat16, shardings) for p in (path, tmp_path / "saved"))
    for spec in param_specs(config):
        np.testing.assert_array_equal(get_param(got, spec), get_param(want, spec))


# ---- Without them ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_another_cpu_goes_through_xla(monkeypatch, home):
    monkeypatch.setattr(native, "_cpu", lambda: "fpu avx512f")
    assert not native.is_available.__wrapped__()
    assert not any(home.iterdir())


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no C++ compiler (no-such-compiler)"), ("false", "exit status 1")]
)
def test_without_a_compiler_the_log_says_so(compiler, said, monkeypatch, home, caplog):
    monkeypatch.setattr(native, "_cpu", lambda: "avx512_bf16")
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING, "jaxllama.model.native"):
        assert not native.is_available.__wrapped__()
    assert said in caplog.text
    assert "XLA" in caplog.text


@needs_kernels
def test_a_source_that_does_not_compile_is_told(monkeypatch, home, caplog):
    source = home / "kernels.cc"
    source.write_text("int main( {")
    monkeypatch.setattr(native, "_SOURCE", source)
    with caplog.at_level(logging.WARNING, "jaxllama.model.native"):
        assert not native.is_available.__wrapped__()
    assert "kernels.cc was not compiled" in caplog.text
    assert "error: expected" in caplog.text


@needs_kernels
def test_they_are_compiled_once_for_each_cpu(monkeypatch, home):
    monkeypatch.setattr(native, "_SOURCE", home / "short.cc")
    native._SOURCE.write_text('extern "C" int one() { return 1; }')
    path = native._compiled(["c++"], native._cpu())
    assert path.parent == home / ".cache" / "jaxllama" / "native"
    assert [*path.parent.iterdir()] == [path]
    made = path.stat().st_mtime_ns
    assert native._compiled(["c++"], native._cpu()) == path
    assert path.stat().st_mtime_ns == made
    assert native._compiled(["c++"], native._cpu() + " another") != path
