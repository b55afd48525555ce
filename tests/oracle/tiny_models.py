"""Tiny Llama configs that cover the architecture's variants, and the rule that gives them weights.

Imported by the oracle (Python 3.11, transformers) and by the tests (jaxllama): NumPy only. The rule stands in for
stored weights, so it must never change; the goldens hold a checksum of what it gave.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

FAR_POSITION = 20_000

_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(vocab_size: int, hidden: int, ffn: int, layers: int, heads: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    } | more


TINY_MODELS: dict[str, dict[str, Any]] = {
    # num_heads × head_dim = 96, hidden_size = 42: a missed transpose cannot hide. (transformers wants num_heads to
    # divide hidden_size all the same.)
    "wide_heads_tied": _config(131, 42, 72, 3, (6, 2), head_dim=16, tie_word_embeddings=True),
    "one_kv_head": _config(137, 44, 76, 2, (4, 1), head_dim=14, rms_norm_eps=1e-6),
    # Llama 2: as many KV heads as heads, head_dim not given.
    "llama2_like": _config(151, 48, 88, 2, (4, 4)),
    "tinyllama_like": _config(149, 64, 92, 2, (8, 2), rms_norm_eps=1e-5),
    "biased": _config(139, 36, 68, 2, (6, 3), head_dim=10, attention_bias=True, mlp_bias=True),
    "linear_rope": _config(127, 52, 84, 2, (4, 2), head_dim=18, rope_parameters=_LINEAR_ROPE),
    "llama31_like": _config(
        157, 56, 96, 2, (4, 2), head_dim=32, max_position_embeddings=131_072, rope_parameters=_LLAMA3_ROPE
    ),
    # As Llama 3.2: tied, factor 32. The original context is so short that all three frequency bands matter at once.
    "llama32_like_tied": _config(
        163, 60, 100, 2, (6, 2), head_dim=24, max_position_embeddings=131_072, tie_word_embeddings=True,
        rope_parameters=_LLAMA3_ROPE | {"factor": 32.0, "rope_theta": 1000.0, "original_max_position_embeddings": 64},
    ),
}  # fmt: skip


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its Hugging Face name. A tied head is not listed."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for block, parts in (("self_attn", attention), ("mlp", mlp)):
            has_bias = config["attention_bias" if block == "self_attn" else "mlp_bias"]
            for name, shape in parts.items():
                shapes[f"{prefix}.{block}.{name}.weight"] = shape
                if has_bias:
                    shapes[f"{prefix}.{block}.{name}.bias"] = shape[:1]
    return shapes


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """`draw_weights` of every tensor of a Llama with this config."""
    return draw_weights(hf_shapes(config), seed)


def draw_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Float32 weights that bfloat16 holds exactly, the same on every machine.

    Tensor i of the sorted names draws standard normals n from `np.random.default_rng([seed, i])`. Norms are 1 + n/4,
    biases n/4, embeddings n, and the other matrices n/√in; then the low 16 bits of each float32 are cleared.
    Attention scores and logits of such a model spread by about 1, so that a wrong rotation or head mapping shows.
    """
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        values = np.random.default_rng([seed, i]).standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + values / 4
        elif name.endswith(".bias"):
            values = values / 4
        elif name != "model.embed_tokens.weight":
            values = values / np.sqrt(shape[1])
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        weights[name] = bits.view(np.float32)
    return weights


def checksum(weights: dict[str, np.ndarray]) -> str:
    """The sha256 of all values in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].astype("<f4").tobytes())
    return digest.hexdigest()


def token_ids(config: dict[str, Any], seed: int, length: int) -> np.ndarray:
    """A fixed random sequence `[length]` over the model's vocabulary."""
    return np.random.default_rng([seed, 1_000_000 + length]).integers(0, config["vocab_size"], length)
