"""A GGUF of each family, written with the gguf package as llama.cpp's converter does, is the model it was made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from jaxllama_convert import convert
from oracle.tiny_families import TINY_FAMILIES
from unit.model.config.families_test import OPTIONS, make_llama, weights_of
from unit.weights.sources.sources import permute

import jaxllama
from jaxllama.errors import ConversionError, JaxLlamaError
from jaxllama.model.config import LlamaConfig
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors

# What llama.cpp calls the architecture, and whether its converter permutes q and k. Mistral's is a Llama's.
ARCHITECTURES = {
    "qwen2": ("qwen2", False),
    "r1_distill_qwen": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "qwen3_biased_yarn": ("qwen3", False),
    "mistral_nemo": ("llama", True),
    "phi3": ("phi3", False),
    "phi3_window": ("phi3", False),
    "phi4_mini": ("phi3", False),
    "granite": ("granite", True),
    "olmo2": ("olmo2", False),
    "olmo2_biased_linear": ("olmo2", False),
    "smollm3": ("smollm3", True),
}
SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def write(path: Path, name: str, **changed: Any) -> None:
    """Keys and tensors as `conversion/*.py` of llama.cpp writes them. `changed` metadata; None leaves a key out."""
    hf, (architecture, permutes) = dict(TINY_FAMILIES[name]), ARCHITECTURES[name]
    rope = hf["rope_parameters"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    original = rope.get("original_max_position_embeddings")
    values: dict[str, Any] = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
        **{key: hf[ours] for ours, key in SCALES.items() if ours in hf},
    }
    if "head_dim" in hf:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture in ("llama", "granite", "smollm3"):
        values |= {"rope.dimension_count": head_dim, "vocab_size": hf["vocab_size"]}
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = original
    tensors = dict(weights_of(name))
    if architecture == "phi3":
        values["attention.sliding_window"] = hf.get("sliding_window") or 0
        values["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1.0) * head_dim)
        values["rope.scaling.original_context_length"] = original or hf["max_position_embeddings"]
        if "short_factor" in rope:
            scale = hf["max_position_embeddings"] / original
            values["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(scale) / np.log(original)))
            for kind in ("long", "short"):
                tensors[f"rope_factors_{kind}.weight"] = np.array(rope[f"{kind}_factor"], np.float32)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**values, **changed}.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{architecture}.{key}", value)
    writer.add_bos_token_id(hf["bos_token_id"])
    writer.add_eos_token_id(hf["eos_token_id"])
    names = gguf.get_tensor_name_map(_kind_of(architecture), hf["num_hidden_layers"])
    for hf_name, weight in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(hf_name.split(".")[-2])
        stored = permute(weight, hf[heads]) if permutes and heads is not None else weight
        theirs = names.get_name(hf_name, (".weight", ".bias")) or hf_name
        writer.add_tensor(theirs, np.ascontiguousarray(stored, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind_of(architecture: str) -> gguf.MODEL_ARCH:
    return next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_and_every_tensor_are_those_of_the_safetensors(name: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", name)
    source = open_source(tmp_path / "model.gguf")
    config = LlamaConfig.from_hf(source.config)
    # GGUF does not say which layers of SmolLM3 rotate: all but every fourth.
    fixed = {"no_rope_layer_interval": 4} if name == "smollm3" else {}
    want = LlamaConfig.from_hf(TINY_FAMILIES[name] | fixed)
    # float32 holds the factor less exactly than the formula.
    assert config.rope.attention_factor == pytest.approx(want.rope.attention_factor, rel=1e-7)
    rope = replace(config.rope, attention_factor=want.rope.attention_factor)
    assert replace(config, rope=rope) == want
    whole = weights_of(name)
    pairs = match_tensors(config, source.tensors, "model.gguf")
    for spec, tensor in pairs:
        rows = whole[spec.hf_name][slice(*(spec.hf_rows or (None, None)))]
        np.testing.assert_array_equal(tensor.read_rows(0, spec.shape[0]), rows, err_msg=spec.name)
    assert {spec.hf_name for spec, _ in pairs} == set(whole)
    source.close()


@pytest.mark.parametrize("name", ["r1_distill_qwen", "phi4_mini"])
def test_logits_are_those_of_the_safetensors(name: str, tmp_path: Path) -> None:
    """Without rotation of rows, or with their fusion; converted."""
    write(tmp_path / "model.gguf", name)
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32")
    ids = list(range(3, 40))
    with make_llama(name) as llama:
        want = llama.logits(ids)
    mesh = jaxllama.make_mesh(LlamaConfig.from_hf(TINY_FAMILIES[name]), tp=1)
    with jaxllama.load(tmp_path / "out", mesh, dtype="float32", options=OPTIONS) as llama:
        np.testing.assert_allclose(llama.logits(ids), want, atol=1e-6 * np.abs(want).max())


def test_granites_attention_scale_may_be_absent(tmp_path: Path) -> None:
    """llama.cpp's is that of a Llama then."""
    write(tmp_path / "model.gguf", "granite", **{"attention.scale": None})
    source = open_source(tmp_path / "model.gguf")
    source.close()
    assert LlamaConfig.from_hf(source.config).attention_scale == 8**-0.5


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("olmo2", {"attention.sliding_window": 4096}, "olmo2.attention.sliding_window"),
        ("qwen3_biased_yarn", {"rope.scaling.yarn_attn_factor": 1.5}, "yarn_attn_factor"),
        ("qwen3_biased_yarn", {"rope.scaling.original_context_length": None}, "original_context_length is missing"),
        ("qwen2", {"rope.scaling.type": "fancy"}, "'fancy'"),
        ("qwen2", {"rope.dimension_count": 4}, "rope.dimension_count is 4"),
        ("phi4_mini", {"rope.scaling.attn_factor": None}, "attn_factor is missing"),
        ("phi4_mini", {"rope.dimension_count": 10}, r"rope_factors_short.weight is F32 \[6\], expected F32 \[5\]"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(
    name: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "model.gguf", name, **changed)
    with pytest.raises(JaxLlamaError, match=message):
        open_source(tmp_path / "model.gguf")


def test_tensors_of_another_family_are_unexpected(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "qwen2")
    source = open_source(tmp_path / "model.gguf")
    with pytest.raises(ConversionError, match=r"missing model\.layers\.0\.self_attn\.q_norm\.weight"):
        match_tensors(replace(LlamaConfig.from_hf(source.config), qk_norm="head"), source.tensors, "x")
    source.close()
