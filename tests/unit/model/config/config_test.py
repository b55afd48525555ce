"""A config.json is read exactly, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllama import LlamaConfig, RopeScaling
from jaxllama.errors import ConfigError
from jaxllama.model import params

R1_ASSETS = Path(__file__).parents[4].parent / "shared" / "assets" / "r1-distill-llama-tokenizer"

LLAMA2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "torch_dtype": "float16",
    "use_cache": True,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA3_8B = LLAMA2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LLAMA31_8B = LLAMA3_8B | {
    "max_position_embeddings": 131072,
    "rope_scaling": LLAMA3_ROPE,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA31_70B = LLAMA31_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA32_1B = LLAMA31_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
}
LLAMA32_3B = LLAMA32_1B | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
}
TINYLLAMA = LLAMA2_7B | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}
SMOLLM2_135M = LLAMA2_7B | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
# The number of weights that the makers publish with each checkpoint.
PUBLISHED = {
    "Llama-2-7b": (LLAMA2_7B, 6_738_415_616),
    "Meta-Llama-3-8B": (LLAMA3_8B, 8_030_261_248),
    "Llama-3.1-70B": (LLAMA31_70B, 70_553_706_496),
    "Llama-3.2-1B": (LLAMA32_1B, 1_235_814_400),
    "Llama-3.2-3B": (LLAMA32_3B, 3_212_749_824),
    "TinyLlama-1.1B": (TINYLLAMA, 1_100_048_384),
    "SmolLM2-135M": (SMOLLM2_135M, 134_515_008),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_number_of_weights_that_its_makers_publish(name):
    hf, num_params = PUBLISHED[name]
    assert params.num_params(LlamaConfig.from_hf(hf)) == num_params


def test_every_dimension_is_read():
    config = LlamaConfig.from_hf(LLAMA31_70B)
    assert config == LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope=RopeScaling(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )
    assert (config.num_heads, config.num_kv_heads) == (64, 8)


def test_head_dim_and_kv_heads_default_to_llama_1():
    config = LlamaConfig.from_hf(LLAMA2_7B)
    assert (config.head_dim, config.num_heads, config.num_kv_heads) == (128, 32, 32)
    assert LlamaConfig.from_hf(LLAMA2_7B | {"head_dim": None, "num_key_value_heads": None}) == config
    assert LlamaConfig.from_hf(LLAMA2_7B | {"head_dim": 64}).head_dim == 64


@pytest.mark.parametrize(
    ("hf", "rope"),
    [
        ({}, RopeScaling(10_000.0)),
        ({"rope_theta": 500_000}, RopeScaling(500_000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeScaling(rope_type="linear", factor=4.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, RopeScaling(rope_type="linear", factor=2.5)),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 7}, RopeScaling(7.0)),
        (
            {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}, "rope_theta": 1.0},
            RopeScaling(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5}, RopeScaling(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_rope_is_read_in_the_old_form_and_the_new(hf, rope):
    assert LlamaConfig.from_hf(LLAMA2_7B | hf).rope == rope


@pytest.mark.parametrize("rope_type", ["su", "ntk", "proportional", "mrope", "", None, 3, ["llama3"]])
def test_an_unknown_rope_type_is_named(rope_type):
    with pytest.raises(ConfigError, match="rope type") as caught:
        LlamaConfig.from_hf(LLAMA2_7B | {"rope_scaling": {"rope_type": rope_type, "factor": 2.0}})
    assert repr(rope_type) in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        {"factor": None},
        {"factor": 0},
        {"factor": "8"},
        {"low_freq_factor": True},
        {"high_freq_factor": float("inf")},
        {"high_freq_factor": 1.0},
        {"original_max_position_embeddings": 8192.5},
        {"original_max_position_embeddings": None},
    ],
)
def test_a_bad_rope_number_is_named(broken):
    with pytest.raises(ConfigError, match=next(iter(broken))):
        LlamaConfig.from_hf(LLAMA31_8B | {"rope_scaling": LLAMA3_ROPE | broken})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", [{"factor": 2.0}, {"rope_theta": 5.0, "factor": 8.0}, {"mscale": 1.0}])
def test_rope_scaling_without_a_type_is_refused(key, scaling):
    with pytest.raises(ConfigError, match="has no rope_type"):
        LlamaConfig.from_hf(LLAMA2_7B | {"rope_scaling": None, key: scaling})


def test_rope_parameters_need_no_type_where_there_is_only_theta():
    hf = LLAMA2_7B | {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 1.0}}
    assert LlamaConfig.from_hf(hf).rope == RopeScaling(7.0)


def test_two_rope_scalings_must_be_one():
    both = LLAMA31_8B | {"rope_parameters": dict(LLAMA3_ROPE)}
    assert LlamaConfig.from_hf(both) == LlamaConfig.from_hf(LLAMA31_8B)
    with pytest.raises(ConfigError, match="both rope_parameters and rope_scaling"):
        LlamaConfig.from_hf(both | {"rope_parameters": LLAMA3_ROPE | {"factor": 4.0}})


# What transformers' or another library's Llama would compute with, and this one does not.
OTHER_COMPUTATIONS: dict[str, Any] = {
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "rotary_dim": 64,
    "quantization": {"group_size": 64, "bits": 4},
    "compression_config": {"format": "int-quantized"},
    "attention_multiplier": 0.0078125,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 224,
    "clip_qkv": 8.0,
    "sliding_window": 1024,
    "layer_types": ["full_attention", "sliding_attention"] * 16,
    "no_rope_layers": [1, 1, 1, 0] * 8,
    "attention_chunk_size": 8192,
    "num_local_experts": 8,
    "use_qk_norm": True,
    "is_causal": False,
    "is_encoder_decoder": True,
    "per_layer_config": {"3": {"num_key_value_heads": 2}},
    "kv_lora_rank": 512,
}


@pytest.mark.parametrize("key", OTHER_COMPUTATIONS)
def test_a_key_that_changes_the_computation_is_refused_by_name(key):
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_hf(LLAMA2_7B | {key: OTHER_COMPUTATIONS[key]})
    assert key in str(caught.value)


def test_all_such_keys_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_hf(LLAMA2_7B | {"clip_qkv": 8.0, "use_qk_norm": True, "sliding_window": 512})
    assert all(key in str(caught.value) for key in ("clip_qkv", "use_qk_norm", "sliding_window"))


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(OTHER_COMPUTATIONS),
        {"partial_rotary_factor": 1.0, "rotary_dim": 128, "attention_multiplier": 128**-0.5, "logits_scaling": 1},
        {"sliding_window": 4096},
        {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 28},
        {"layer_types": ["full_attention"] * 32, "no_rope_layers": [1] * 32},
        {"use_qk_norm": False, "is_causal": True, "num_local_experts": 0, "quantization": {}, "pretraining_tp": 4},
    ],
)
def test_keys_that_change_nothing_pass(changes):
    assert LlamaConfig.from_hf(LLAMA2_7B | changes) == LlamaConfig.from_hf(LLAMA2_7B)


@pytest.mark.parametrize("scaling", ["linear", 4, [1]])
def test_rope_scaling_must_be_an_object(scaling):
    with pytest.raises(ConfigError, match="rope_scaling"):
        LlamaConfig.from_hf(LLAMA2_7B | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "qwen2"}, "LlamaForCausalLM"),
        ({"model_type": None, "architectures": None}, "model_type"),
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": "awq"}, "quantization"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -4096}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"intermediate_size": 2**31}, "intermediate_size"),
        ({"num_hidden_layers": []}, "num_hidden_layers"),
        ({"num_attention_heads": 30}, "num_attention_heads"),
        ({"num_attention_heads": 30, "head_dim": 128, "num_key_value_heads": 8}, "num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 127}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 2}, "attention_bias"),
        ({"mlp_bias": []}, "mlp_bias"),
        ({"eos_token_id": 32000}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"bos_token_id": 1.0}, "bos_token_id"),
        ({"bos_token_id": []}, "bos_token_id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
    ],
)
def test_what_is_unsupported_or_contradictory_is_named(broken, named):
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_hf(LLAMA2_7B | broken)
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


def test_all_that_is_missing_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_hf({"model_type": "llama", "hidden_size": 8})
    for key in ("vocab_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps", "max_position_embeddings"):
        assert key in str(caught.value)
    assert "hidden_size" not in str(caught.value)


def test_no_end_of_sequence_id_is_fine():
    config = LlamaConfig.from_hf(LLAMA2_7B | {"eos_token_id": None, "bos_token_id": None})
    assert config.eos_token_ids == ()
    assert config.bos_token_id is None


def test_a_config_is_hashable_and_static_under_jit():
    config = LlamaConfig.from_hf(LLAMA31_8B)
    assert hash(config) == hash(LlamaConfig.from_hf(json.loads(json.dumps(LLAMA31_8B))))
    assert jax.jit(lambda x, c: x * c.num_layers, static_argnums=1)(2, config) == 64
    assert dataclasses.replace(config, num_layers=31) != config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from([*LLAMA31_8B, "head_dim", "auto_map", "quantization_config"]), JSON, max_size=4))
def test_any_json_is_a_config_or_a_config_error(changes):
    try:
        config = LlamaConfig.from_hf(LLAMA31_8B | changes)
    except ConfigError:
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert params.num_params(config) > 0


@pytest.mark.skipif(not R1_ASSETS.is_dir(), reason="the shared assets are not on this machine")
@pytest.mark.parametrize(("name", "num_params"), [("8b", 8_030_261_248), ("70b", 70_553_706_496)])
def test_r1_distill_configs_are_read(name, num_params):
    config = LlamaConfig.from_hf(json.loads((R1_ASSETS / f"config.{name}.json").read_text()))
    assert params.num_params(config) == num_params
    assert config.rope == RopeScaling(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001,)
