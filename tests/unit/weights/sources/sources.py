"""Tiny source checkpoints for the converter's tests. Sizes are distinct and num_heads × head_dim ≠ hidden_size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import param_specs

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 70,
    "hidden_size": 20,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# GGUF blocks need rows of a multiple of 32.
GGUF_CONFIG = CONFIG | {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}


def weights(config: Mapping[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face name."""
    rng = np.random.default_rng(seed)
    return {s.hf_name: rng.standard_normal(s.shape).astype(dtype) for s in param_specs(LlamaConfig.from_hf(config))}


def write_hf(
    folder: Path, config: Mapping[str, Any] = CONFIG, tensors: Mapping[str, np.ndarray] | None = None, shards: int = 1
) -> dict[str, np.ndarray]:
    """Writes a Hugging Face folder and returns its tensors."""
    tensors = dict(weights(config) if tensors is None else tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: value for i, (key, value) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def raw_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: half-split to interleaved rotary order."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name: str) -> str:
    """The llama.cpp name of a Hugging Face tensor."""
    stem, kind = hf_name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, module = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path,
    config: Mapping[str, Any] = GGUF_CONFIG,
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    blocks: Callable[[gguf.GGMLQuantizationType, tuple[int, ...], int], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file and returns what its tensors dequantise to, in Hugging Face names and order.

    `blocks` gives the block data of a matrix of some shape, from a seed; otherwise the weights are quantised.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    want = {}
    for name, weight in (weights(config) if tensors is None else tensors).items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        stored = weight if heads is None else permute(weight, config[heads])
        kind = quant if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        if blocks is not None and weight.ndim > 1:
            # Already quantised, in the order of Hugging Face; permuting whole rows leaves the blocks as they are.
            data = blocks(kind, weight.shape, len(want))
            want[name] = gguf.dequantize(data, kind)
            writer.add_tensor(gguf_name(name), data if heads is None else permute(data, config[heads]), raw_dtype=kind)
            continue
        data = gguf.quantize(stored, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        # The permutation only moves whole rows, so quantising the unpermuted rows gives the same values.
        want[name] = gguf.dequantize(gguf.quantize(weight, kind), kind)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return want


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)
