"""Feed-forward weights in parts are the same weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxllama.llama
from jaxllama import make_mesh
from jaxllama.model.params import Params, QuantizedWeight, get_param, param_specs, stored_specs
from jaxllama.model.platforms import tpu
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.forms import get_whole
from jaxllama.weights.loading import load_params
from jaxllama.weights.parts import num_ffn_parts, split_ffn, suitable_num_parts

# Biases everywhere, ffn 72: eight devices hold 9 of it each.
CONFIG = tiny.config_of("divisible", mlp_bias=True)


def make_params(tp: int, quantize: str | None) -> Params:
    weights = dict(tiny.weights_of("divisible"))
    rng = np.random.default_rng(1)
    for spec in param_specs(CONFIG):
        weights.setdefault(spec.hf_name, rng.standard_normal(spec.shape).astype(np.float32))
    return tiny.make_params(CONFIG, weights, make_mesh(CONFIG, tp=tp), quantize=quantize)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("tp", "num_parts"), [(1, 2), (4, 3), (8, 9)])
def test_the_whole_comes_back_bit_for_bit_where_it_was(tp, num_parts, quantize):
    before, params = make_params(tp, quantize), make_params(tp, quantize)
    split = split_ffn(params, num_parts)
    for layer in split["layers"]:
        assert not set(layer) & {"gate_proj", "up_proj", "down_proj", "gate_proj_bias", "down_proj_bias"}
        assert len(layer["ffn_parts"]) == num_parts
    down = split["layers"][0]["ffn_parts"][0]["down_proj"]
    down = down.values if isinstance(down, QuantizedWeight) else down
    assert down.shape == (CONFIG.hidden_size, CONFIG.intermediate_size // num_parts)
    assert {shard.data.shape[1] for shard in down.addressable_shards} == {72 // num_parts // tp}
    for spec in param_specs(CONFIG):
        for part in stored_specs(spec, quantize):
            got, want = get_whole(split, part), get_param(before, part)
            assert got.sharding.is_equivalent_to(want.sharding, want.ndim), part.name
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), part.name)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_in_parts_computes_the_same(quantize):
    ids = tiny.prompt_of("divisible", 20)
    whole = jaxllama.llama.Llama(CONFIG, make_params(2, quantize), make_mesh(CONFIG, tp=2), options=tiny.SMALL)
    params = split_ffn(make_params(2, quantize), 3)
    parts = jaxllama.llama.Llama(CONFIG, params, make_mesh(CONFIG, tp=2), options=tiny.SMALL)
    with whole, parts:
        np.testing.assert_allclose(parts.logits(ids), whole.logits(ids), atol=2e-6)


@pytest.mark.parametrize(
    ("width", "num_bytes", "num_parts"),
    [
        (3584, 3584 * 8192 * 2, 2),  # the 70B on v6e-8
        (7168, 7168 * 8192 * 2, 4),  # v5p-4
        (1792, 1792 * 8192 * 2, 1),  # v5e-16
        (3584, 3584 * 8192, 1),  # int8 on v5e-8
        (14336, 14336 * 4096 * 2, 4),  # the 8B on one chip
        (6656, 6656 * 16384 * 2, 13),  # the 405B on eight: 52 lanes' worth
        (2176, 2176 * 2**16 * 2, 1),  # 17 lanes' worth: in nothing but 17 parts
        (72, 72 * 2**24, 1),
    ],
)
def test_parts_are_small_enough_and_fill_lanes(width, num_bytes, num_parts):
    assert suitable_num_parts(width, num_bytes, tpu.MAX_PART_BYTES) == num_parts


def test_only_tpus_get_parts(tmp_path, monkeypatch):
    assert num_ffn_parts(make_params(2, None), None) == 1
    assert describe_platform(CONFIG, make_mesh(CONFIG, tp=2), dtype=jnp.float32).max_part_bytes is None
    checkpoint = Checkpoint.open(tiny.write_checkpoint(tmp_path / "model", "divisible"))
    mesh = make_mesh(checkpoint.config, tp=2)
    for quantize in (None, "int8"):
        assert "ffn_parts" not in load_params(checkpoint, mesh, jnp.float32, quantize)["layers"][0]
    # What a TPU would get, when it would want two.
    monkeypatch.setattr("jaxllama.model.platforms.cpu.native.is_available", lambda: False)
    monkeypatch.setattr("jaxllama.weights.forms.num_ffn_parts", lambda *_: 2)
    for quantize in (None, "int8"):
        params: Any = load_params(checkpoint, mesh, jnp.float32, quantize)
        assert [len(layer["ffn_parts"]) for layer in params["layers"]] == [2] * checkpoint.config.num_layers
