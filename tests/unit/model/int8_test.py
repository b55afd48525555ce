"""int8 is near what it rounds, the model is exactly the model of the rounded weights, and every way to it agrees."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from oracle.tiny_models import TINY_MODELS
from unit.weights.sources.sources import CONFIG, weights, write_hf

import jaxllama
from jaxllama import SamplingParams
from jaxllama.decode.state import state_shapes
from jaxllama.decode.steps import decode_steps
from jaxllama.errors import CheckpointError, ConfigError, ConversionError
from jaxllama.model.forward import DecoderLayer, Transformer
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import make_mesh, param_shardings
from jaxllama.model.params import (
    Params,
    QuantizedWeight,
    build_params,
    get_param,
    num_params,
    param_specs,
    stored_specs,
)
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.weights.arrays import files as array_files
from jaxllama.weights.checkpoint import MANIFEST, Checkpoint
from jaxllama.weights.forms import unpack
from jaxllama.weights.loading import load_params, restore_params

pytestmark = pytest.mark.optimized

INT8_KV = dataclasses.replace(tiny.SMALL, kv_dtype="int8")


def assert_same(got: Params, want: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


# ---- Rounding ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_rounding_is_off_by_half_a_step_at_most(dtype, magnitude):
    rng = np.random.default_rng(0)
    # Rows of very different sizes.
    x = (rng.standard_normal((53, 131)) * magnitude * 10.0 ** rng.integers(-4, 4, (53, 1))).astype(jnp.dtype(dtype))
    values, scale = quantize_rows(x)
    assert (values.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (53,))
    exact = x.astype(np.float64)
    assert (np.abs(values).max(axis=1) == 127).all()
    np.testing.assert_allclose(scale * 127.0, np.abs(exact).max(axis=1), rtol=1e-6)
    got = values * scale[:, None].astype(np.float64)
    assert (np.abs(got - exact) <= 0.5001 * scale[:, None]).all()
    # The slow twin, but for numbers halfway between two values.
    assert (np.abs(got - reference.round_to_int8(exact)) > 0.1 * scale[:, None]).mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numpy_and_xla_round_to_the_same_bits(dtype):
    """The converter rounds with one, loading with the other."""
    x = (np.random.default_rng(1).standard_normal((300, 576)) * 0.1).astype(jnp.dtype(dtype))
    for a, b in zip(quantize_rows(x), jax.jit(quantize_rows)(x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_channel_of_zeros_stays_zero():
    x = np.random.default_rng(2).standard_normal((4, 9)).astype(np.float32)
    x[1], x[2] = 0, 1e-42
    values, scale = quantize_rows(x)
    assert not values[1:3].any()
    assert scale[1] == 0
    assert np.isfinite(scale).all()
    assert values[[0, 3]].any(axis=1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_the_scale_nan(bad):
    x = np.random.default_rng(3).standard_normal((4, 9)).astype(np.float32)
    x[2, 5] = bad
    _, scale = jax.jit(quantize_rows)(x)
    assert np.isnan(np.asarray(scale)).tolist() == [False, False, True, False]


# ---- The table ----


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_matrix_has_values_and_a_scale_and_nothing_else_changes(name):
    config = tiny.config_of(name)
    for spec in param_specs(config):
        parts = stored_specs(spec, "int8")
        assert stored_specs(spec, None) == (spec,)
        if len(spec.shape) == 1:
            assert parts == (spec,)
            continue
        values, scale = parts
        assert (values.shape, values.axes, values.dtype) == (spec.shape, spec.axes, "int8")
        axes = ("embed_scale",) if spec.path == ("embed_tokens",) else spec.axes[:1]
        assert (scale.shape, scale.axes, scale.dtype) == (spec.shape[:1], axes, "float32")
    assert num_params(config) == sum(array.size for array in tiny.weights_of(name).values())


@pytest.mark.parametrize("tp", [1, 4, 8])
def test_values_shard_as_the_matrix_and_scales_as_its_channels(tp):
    config = tiny.config_of("divisible")
    mesh = make_mesh(config, tp=tp)
    plain, int8 = param_shardings(config, mesh), param_shardings(config, mesh, "int8")
    for spec in param_specs(config):
        want, got = get_param(plain, spec), get_param(int8, spec)
        if len(spec.shape) == 1:
            assert got == want
        else:
            assert got.values == want
            is_embedding = spec.path == ("embed_tokens",)
            assert tuple(got.scale.spec) == ((None,) if is_embedding else tuple(want.spec)[:1])


# ---- The model ----


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    a, b = reference.softmax(p.astype(np.float64)), reference.softmax(q.astype(np.float64))
    return float((a * np.log(a / b)).sum(axis=1).mean())


@pytest.mark.parametrize("name", [*TINY_MODELS, "divisible"])
def test_an_int8_model_is_the_model_of_its_rounded_weights(name):
    config, ids = tiny.config_of(name), tiny.prompt_of(name, 150)
    with tiny.make_llama(name, quantize="int8") as llama:
        got = llama.logits(ids)
        rounded = tiny.dequantized(config, llama.params)
    want = reference.llama_logits(rounded, config, ids)
    # The tolerance of float32 weights (model_test.py).
    assert np.abs(got - want).max() < 5e-6 * max(1.0, want.std())
    assert np.abs(got - tiny.reference_logits(name, ids)).max() > 1e-4 * want.std(), "nothing was rounded"


@pytest.mark.parametrize("name", ["wide_heads_tied", "biased", "divisible"])
def test_an_int8_model_decodes_as_its_rounded_weights_say(name):
    """Models that differ in their matrices: decoding multiplies them by other programs than `logits`."""
    config, ids = tiny.config_of(name), tiny.prompt_of(name, 20)
    with tiny.make_llama(name, quantize="int8") as llama:
        rounded = tiny.dequantized(config, llama.params)
        completion = llama.generate(ids, SamplingParams(temperature=0, ignore_eos=True, max_tokens=6))
    logits = reference.llama_logits(rounded, config, [*ids, *completion.token_ids])[19:-1]
    chosen = np.take_along_axis(logits, np.asarray(completion.token_ids)[:, None], axis=1)[:, 0]
    assert (logits.max(axis=1) - chosen).max() < 1e-4


@pytest.mark.parametrize("name", ["wide_heads_tied", "biased"])
def test_the_norms_decide_what_an_int8_model_computes_in(name):
    ids = tiny.prompt_of(name, 100)
    with (
        tiny.make_llama(name, quantize="int8") as exact,
        tiny.make_llama(name, quantize="int8", dtype=jnp.bfloat16) as rough,
    ):
        assert (exact.engine.kv_dtype, rough.engine.kv_dtype) == (jnp.float32, jnp.bfloat16)
        a, b = exact.logits(ids), rough.logits(ids)
    assert 1e-3 < np.abs(a - b).max() < 0.5
    assert divergence(a, b) < 2e-3


def test_no_product_makes_a_matrix_of_scaled_weights():
    """The scale goes to the product's outputs: a multiplication of a whole matrix would be a copy of the weights."""
    config = tiny.config_of("divisible")
    params = tiny.make_params(config, tiny.weights_of("divisible"), make_mesh(config, tp=1), quantize="int8")
    matrices = {spec.shape for spec in param_specs(config) if len(spec.shape) == 2}

    def logits(params: Params, hidden: jax.Array) -> jax.Array:
        out = DecoderLayer(config, params["layers"][0], jnp.float32).mlp_parts[0](hidden)
        return Transformer(config, params, PLAIN).logits(out)

    jaxpr = jax.make_jaxpr(logits)(params, jnp.ones((3, 2, config.hidden_size)))
    made = [(eqn.primitive.name, var.aval.shape) for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars]
    # The choice of a platform's form, which passes the integers on, and the conversion, which a product takes in.
    assert [name for name, shape in made if shape in matrices] == ["cond", "convert_element_type"] * 4


def test_decoding_does_not_hold_the_weights_in_another_dtype():
    """XLA moves what a loop does not change before the loop: there all matrices would be converted at once."""
    config = tiny.config_of("smollm2_like", vocab_size=520)
    mesh = make_mesh(config, tp=1)
    shapes = state_shapes(config, num_rows=2, num_pages=5, page_size=4, max_context=16, dtype=jnp.float32)
    temporary = []
    for quantize in (None, "int8"):
        shardings = param_shardings(config, mesh, quantize)

        def leaf(spec: Any, shardings: Params = shardings) -> Any:
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype or jnp.float32, sharding=get_param(shardings, spec))

        params = build_params(config, leaf, quantize)
        lowered = decode_steps.lower(config, params, shapes, np.int32(1), np.ones(2, bool), num_rows=2)
        temporary.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    # Two matrices or three are in work at a time, of fifteen.
    assert temporary[1] - temporary[0] < num_params(config) * 4 / 2


@pytest.mark.parametrize("name", ["divisible", "biased", "wide_heads_tied"])
def test_an_int8_cache_is_a_cache_of_rounded_keys_and_values(name):
    ids = tiny.prompt_of(name, 150)
    with tiny.make_llama(name, options=INT8_KV) as llama:
        got = llama.logits(ids)
    plain = tiny.reference_logits(name, ids)
    rounded = reference.llama_logits(tiny.weights_of(name), tiny.config_of(name), ids, cached=reference.round_to_int8)
    # Float32 and float64 now and then round to different integers; measured: at most a tenth of what rounding does.
    assert np.abs(got - rounded).mean() < 0.1 * np.abs(plain - rounded).mean()
    assert np.abs(got - rounded).max() < 0.5 * np.abs(plain - rounded).max()
    assert divergence(plain, got) < 1e-3


# ---- Loading and converting ----


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    write_hf(folder, CONFIG, weights(CONFIG))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 4])
def test_converting_to_int8_and_loading_as_int8_give_the_same_bits(tmp_path, source, dtype, tp):
    from jaxllama_convert import convert

    convert(source, tmp_path / "plain", dtype=dtype)
    report = convert(source, tmp_path / "int8", dtype=dtype, quantize="int8", verify=True)
    plain, int8 = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "int8")
    assert (int8.dtype, int8.manifest.quantize, plain.manifest.quantize) == (dtype, "int8", None)
    mesh = make_mesh(plain.config, tp=tp)
    want = load_params(plain, mesh, dtype, "int8")
    assert isinstance(unpack(want["embed_tokens"]), QuantizedWeight)
    assert want["norm"].dtype == dtype
    assert_same(load_params(int8, mesh, dtype), want)
    # Asked for once more it is what it is.
    assert_same(load_params(int8, mesh, dtype, "int8"), want)
    if isinstance(want["embed_tokens"], QuantizedWeight):
        shardings = param_shardings(plain.config, mesh, "int8")
        assert jax.tree.all(jax.tree.map(lambda array, sharding: array.sharding == sharding, want, shardings))
    size = {"int8": 1, "float32": 4, None: jnp.dtype(dtype).itemsize}
    parts = [part for spec in param_specs(plain.config) for part in stored_specs(spec, "int8")]
    assert report.num_bytes == sum(part.size * size[part.dtype] for part in parts)


def test_int8_weights_do_not_depend_on_the_dtype_they_are_loaded_for(tmp_path, source):
    from jaxllama_convert import convert

    convert(source, tmp_path / "c", dtype="float32")
    checkpoint = Checkpoint.open(tmp_path / "c")
    mesh = make_mesh(checkpoint.config, tp=1)
    exact, rough = (load_params(checkpoint, mesh, dtype, "int8") for dtype in ("float32", "bfloat16"))
    assert_same(rough["layers"][0]["q_proj"], exact["layers"][0]["q_proj"])
    assert (exact["norm"].dtype, rough["norm"].dtype) == (jnp.float32, jnp.bfloat16)


def test_an_int8_checkpoint_generates_as_the_rounded_weights_say(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "c", "divisible")
    prompt = tiny.prompt_of("divisible", 12)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
    config = Checkpoint.open(folder).config
    with jaxllama.load(folder, make_mesh(config, tp=1), quantize="int8", options=INT8_KV) as llama:
        got = llama.generate(prompt, params).token_ids
    with tiny.make_llama(quantize="int8", options=INT8_KV) as llama:
        assert got == llama.generate(prompt, params).token_ids


def test_plain_orbax_restores_an_int8_checkpoint(tmp_path, source):
    import orbax.checkpoint as ocp
    from jaxllama_convert import convert

    convert(source, tmp_path / "c", quantize="int8")
    checkpoint = Checkpoint.open(tmp_path / "c")
    want = load_params(checkpoint, make_mesh(checkpoint.config, tp=1), checkpoint.dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path / "c" / "params")
    weight = unpack(want["layers"][1]["o_proj"])
    for name in ("values", "scale"):
        np.testing.assert_array_equal(got["layers"][1]["o_proj"][name], getattr(weight, name))


def test_an_interrupted_conversion_to_int8_resumes(tmp_path, source, monkeypatch):
    from jaxllama_convert import convert

    convert(source, tmp_path / "whole", quantize="int8")
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(array_files.os, "fsync", fsync)
        with pytest.raises(ConversionError, match="resume"):
            convert(source, tmp_path / "c", quantize="int8")
    # How many arrays thirty files are is for the threads to say.
    assert convert(source, tmp_path / "c", quantize="int8", verify=True).num_resumed > 0
    files = [Checkpoint.open(tmp_path / name).manifest.files for name in ("whole", "c")]
    params = [{name: r for name, r in f.items() if "." in name.removeprefix("params/")} for f in files]
    assert params[0].keys() == params[1].keys()
    assert all(params[0][name] == params[1][name] for name in params[0] if name.startswith("params/layers"))


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    from jaxllama_convert import convert

    poisoned = dict(tiny.weights_of("divisible"))
    name = "model.layers.1.mlp.up_proj.weight"
    poisoned[name] = poisoned[name].copy()
    poisoned[name][3, 1] = np.nan
    write_hf(tmp_path / "src", tiny.MODELS["divisible"], poisoned)
    with pytest.raises(ConversionError, match=re.escape(name)):
        convert(tmp_path / "src", tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()
    # The converter lets none through; a checkpoint of other making is caught when it is rounded.
    checkpoint = Checkpoint.open(tiny.write_checkpoint(tmp_path / "c", "divisible", poisoned))
    with pytest.raises(CheckpointError, match=r"layers\.1\.up_proj has NaN"):
        load_params(checkpoint, make_mesh(checkpoint.config, tp=1), "float32", "int8")


def test_another_quantization_is_named(tmp_path, source):
    from jaxllama_convert import convert

    with pytest.raises(ConversionError, match="quantize 'int4'"):
        convert(source, tmp_path / "c", quantize="int4")
    convert(source, tmp_path / "c", quantize="int8")
    with pytest.raises(ConfigError, match="quantize must be 'int8' or None, got 'int4'"):
        jaxllama.load(tmp_path / "c", quantize="int4")
    with pytest.raises(ConfigError, match="kv_dtype must be 'int8' or None, got 'float8'"):
        jaxllama.EngineOptions(kv_dtype="float8")
    manifest = json.loads((tmp_path / "c" / MANIFEST).read_text())
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(manifest | {"quantize": "int4"}))
    with pytest.raises(CheckpointError, match="quantization 'int4'"):
        Checkpoint.open(tmp_path / "c")


def test_a_manifest_that_hides_the_quantization_is_named(tmp_path, source):
    from jaxllama_convert import convert

    convert(source, tmp_path / "c", quantize="int8")
    manifest = json.loads((tmp_path / "c" / MANIFEST).read_text())
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(manifest | {"quantize": None}))
    checkpoint = Checkpoint.open(tmp_path / "c")
    shardings = param_shardings(checkpoint.config, make_mesh(checkpoint.config, tp=1))
    with pytest.raises(CheckpointError, match="tensor embed_tokens is not in the checkpoint"):
        restore_params(checkpoint, "float32", shardings)
