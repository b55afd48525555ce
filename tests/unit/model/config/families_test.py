"""Every family computes what transformers does: logits, and tokens through the engine's chunks and steps."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxllama_convert import convert
from oracle.tiny_families import TINY_FAMILIES
from oracle.tiny_models import checksum, draw_weights
from unit.model.forward_test import last_logits_of_one_layer
from unit.weights.sources.sources import write_hf

import jaxllama
from jaxllama import EngineOptions, LlamaConfig, SamplingParams
from jaxllama.errors import ConfigError
from jaxllama.model.config import FAMILIES
from jaxllama.model.params import param_specs

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parents[3] / "golden" / "families.npz"
TOLERANCE = 2e-5  # of the logits' spread; measured: up to 5e-6
OPTIONS = EngineOptions(max_rows=2, max_context=64, page_size=4, num_pages=61, chunk_sizes=(8, 32))
# Conversion is the same for all but in how tensors are named, joined and shaped.
GREEDY = (
    "qwen2_upper_windows", "qwen3", "mistral_window", "ministral", "phi4_mini", "phi3_long", "granite", "olmo2",
    "smollm3_windows",
)  # fmt: skip
CONVERTED = ("phi3", "olmo2_biased_linear", "qwen3_biased_yarn", "granite")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


@functools.cache
def weights_of(name: str) -> tiny.Weights:
    """By the names and shapes that transformers gives them."""
    shapes = {key: tuple(shape) for key, shape in json.loads(str(golden()[f"{name}/shapes"])).items()}
    weights = draw_weights(shapes, 100 + list(TINY_FAMILIES).index(name))
    assert checksum(weights) == str(golden()[f"{name}/sha256"])
    return weights


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_tensor_of_transformers_is_a_parameter_once(name):
    specs = param_specs(LlamaConfig.from_hf(TINY_FAMILIES[name]))
    held: dict[str, int] = {}
    for spec in specs:
        start, stop = spec.hf_rows or (0, spec.shape[0])
        assert stop - start == spec.shape[0]
        assert held.get(spec.hf_name, 0) == start
        held[spec.hf_name] = stop
    assert held == {key: value.shape[0] for key, value in weights_of(name).items()}
    assert len({spec.path for spec in specs}) == len(specs)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_logits_agree_with_transformers(name):
    ids, want = golden()[f"{name}/near_ids"], golden()[f"{name}/near_logits"]
    with make_llama(name) as llama:
        got = llama.logits(ids)
    assert np.abs(got - want).max() < TOLERANCE * want.std()


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_agree_with_transformers(name):
    """Prefill in two chunks, then single steps, past every window."""
    ids, want = golden()[f"{name}/near_ids"].tolist(), golden()[f"{name}/greedy"].tolist()
    with make_llama(name) as llama:
        got = llama.generate(ids, SamplingParams(temperature=0, max_tokens=len(want), ignore_eos=True)).token_ids
    assert list(got) == want


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_is_the_same(name, tmp_path):
    write_hf(tmp_path / "hf", TINY_FAMILIES[name], weights_of(name), shards=3)
    convert(tmp_path / "hf", tmp_path / "out", dtype="float32")
    ids = golden()[f"{name}/near_ids"]
    with make_llama(name) as llama:
        want = llama.logits(ids)
    mesh = jaxllama.make_mesh(LlamaConfig.from_hf(TINY_FAMILIES[name]), tp=1)
    for place in ("out", "hf"):  # converted, and as it is
        with jaxllama.load(tmp_path / place, mesh, dtype="float32", options=OPTIONS) as llama:
            np.testing.assert_array_equal(llama.logits(ids), want)


def test_eight_devices_that_do_not_divide_the_heads_are_the_same():
    """6 query heads over 2 KV heads, as 28 over 4: the projections are split as far as the KV heads are."""
    name = "qwen2"
    ids = golden()[f"{name}/near_ids"].tolist()
    with make_llama(name) as one, make_llama(name, tp=8) as eight:
        want, got = one.logits(ids), eight.logits(ids)
    assert np.abs(got - want).max() < TOLERANCE * want.std()


@pytest.mark.parametrize("name", ["olmo2", "qwen2_upper_windows"])
def test_a_mesh_of_four_devices_is_the_same(name):
    ids = golden()[f"{name}/near_ids"].tolist()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with make_llama(name) as one, make_llama(name, tp=4) as four:
        want, got = one.logits(ids), four.logits(ids)
        assert np.abs(got - want).max() < TOLERANCE * want.std()
        assert four.generate(ids, params).token_ids == one.generate(ids, params).token_ids


@pytest.mark.parametrize("name", ["granite", "olmo2"])
def test_bfloat16_and_int8_stay_close(name):
    ids = golden()[f"{name}/near_ids"]
    with make_llama(name) as llama, make_llama(name, dtype=jnp.bfloat16) as rounded:
        exact, halved = llama.logits(ids), rounded.logits(ids)
    with make_llama(name, quantize="int8") as quantized:
        eighth = quantized.logits(ids)
    for other, least, most in ((halved, 1e-3, 0.1), (eighth, 1e-3, 0.3)):
        assert least < np.abs(other - exact).max() / exact.std() < most


def test_windows_and_yarn_far_beyond_the_original_context():
    """Position 20,000, a window of 300 and YaRN from 256: one layer, against the float64 reference."""
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 16.0, "original_max_position_embeddings": 256}
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 300}
    changes |= {"rope_parameters": yarn, "max_position_embeddings": 32_768}
    num_tokens, num_checked = 20_021, 21
    config, weights = tiny.config_of("far", **changes), tiny.weights_of("far")
    assert config.windows == (300,)
    ids = np.array(tiny.prompt_of("far", num_tokens))
    options = EngineOptions(page_size=64, chunk_sizes=(64,), max_rows=1)
    with tiny.make_llama("far", options=options, **changes) as llama:
        got = llama.logits(ids)[-num_checked:]
    want = last_logits_of_one_layer(config, weights, ids, num_checked)
    assert np.abs(got - want).max() < TOLERANCE * want.std()


def test_every_family_has_a_golden():
    assert {hf["architectures"][0] for hf in TINY_FAMILIES.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"model_type": "llama"}, "disagree"),
        ("qwen2", {"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ("qwen2", {"model_type": "gemma3"}, "gemma3"),
        ("qwen2", {"num_experts": 8}, "num_experts 8"),
        ("qwen2", {"attention_multiplier": 2.0}, "attention_multiplier"),
        ("qwen2_upper_windows", {"layer_types": ["full_attention"]}, "layer_types must be a list of 4 values"),
        ("qwen2_upper_windows", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("mistral_window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral_window", {"sliding_window": -1}, "sliding_window must be a positive integer"),
        ("phi4_mini", {"partial_rotary_factor": 0.2, "rope_parameters": {"rope_theta": 1e4}}, "must be even"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a positive number"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of 5 values"),
        ("smollm3", {"no_rope_layers": [2] * 5}, "no_rope_layers must be a list of 0 and 1"),
        ("mistral_nemo", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("yarn_untruncated", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position"),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_hf(TINY_FAMILIES[name] | changes)


def test_longrope_serves_the_original_context_unless_more_is_asked_for():
    """Beyond it all frequencies change, those of tokens that are in the cache already too: so a model has one or the
    other, and the goldens of `phi4_mini` are within its original context, those of `phi3_long` beyond."""
    config = LlamaConfig.from_hf(TINY_FAMILIES["phi4_mini"])
    assert config.max_position_embeddings == 64 < TINY_FAMILIES["phi4_mini"]["max_position_embeddings"]
    assert config.rotary_dim == 12
    assert config.for_context(None) == config.for_context(64) == config
    longer = config.for_context(65)
    assert longer.max_position_embeddings == TINY_FAMILIES["phi4_mini"]["max_position_embeddings"]
    assert longer.rope.divisors == config.rope.long_divisors != config.rope.divisors
    assert longer.for_context(64) == longer
    with make_llama("phi4_mini") as llama:
        assert llama.config == config
        assert llama.max_context == 64
    with make_llama("phi3_long") as llama:
        assert llama.max_context == 64
        assert llama.config.max_position_embeddings == 256


def make_llama(name: str, **more) -> jaxllama.Llama:
    changes = {"head_dim": None} | TINY_FAMILIES[name]
    return tiny.make_llama("divisible", weights=weights_of(name), options=OPTIONS, **more, **changes)
