"""Tiny models of every family that is not a Llama: each has odd sizes and what its family differs in, more than once.

Imported by the oracle (Python 3.11, transformers) and by the tests (jaxllama): no imports but the rule for weights.
"""

from __future__ import annotations

from typing import Any

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
}


def _config(
    model_type: str, architecture: str, sizes: tuple[int, int, int, int], heads: tuple[int, int], **more: Any
) -> dict[str, Any]:
    vocab_size, hidden, ffn, layers = sizes
    return {
        "model_type": model_type,
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": _config("qwen2", "Qwen2", (131, 48, 76, 2), (6, 2), tie_word_embeddings=True),
    # As R1-Distill-Qwen: a bias on q, k and v, a window that is switched off.
    "r1_distill_qwen": _config(
        "qwen2", "Qwen2", (137, 40, 68, 2), (5, 1), use_sliding_window=False, sliding_window=7, max_window_layers=1
    ),
    "qwen2_upper_windows": _config(
        "qwen2", "Qwen2", (139, 48, 72, 4), (4, 2), use_sliding_window=True, sliding_window=7, max_window_layers=2
    ),
    "qwen3": _config("qwen3", "Qwen3", (149, 44, 84, 2), (4, 2), head_dim=14),
    "qwen3_biased_yarn": _config(
        "qwen3", "Qwen3", (151, 44, 84, 3), (4, 1), head_dim=32, attention_bias=True, rope_parameters=_YARN
    ),
    "mistral_window": _config("mistral", "Mistral", (157, 48, 88, 2), (6, 3), sliding_window=5),
    "mistral_nemo": _config("mistral", "Mistral", (163, 42, 72, 2), (6, 2), head_dim=16, sliding_window=None),
    "ministral": _config(
        "ministral", "Ministral", (167, 48, 68, 4), (4, 2), head_dim=18, sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": _config("phi3", "Phi3", (173, 48, 76, 2), (6, 2)),
    "phi3_window": _config("phi3", "Phi3", (179, 40, 52, 2), (4, 4), sliding_window=9),
    "phi4_mini": _config(
        "phi3", "Phi3", (181, 64, 92, 2), (4, 2), tie_word_embeddings=True, original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.05, 1.1, 1.3, 1.5, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "original_max_position_embeddings": 64,
        },
    ),
    "granite": _config(
        "granite", "Granite", (191, 48, 84, 3), (6, 2), embedding_multiplier=12.0, residual_multiplier=0.22,
        attention_multiplier=0.35, logits_scaling=8.0, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    "olmo2": _config("olmo2", "Olmo2", (193, 48, 72, 2), (6, 3)),
    "olmo2_biased_linear": _config(
        "olmo2", "Olmo2", (197, 60, 64, 2), (6, 2), attention_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0},
    ),
    "smollm3": _config("smollm3", "SmolLM3", (199, 48, 80, 5), (4, 2), no_rope_layer_interval=2),
    "smollm3_windows": _config(
        "smollm3", "SmolLM3", (211, 48, 80, 4), (4, 1), no_rope_layers=[1, 0, 1, 0], use_sliding_window=True,
        sliding_window=6, tie_word_embeddings=True,
    ),
    "yarn_untruncated": _config(
        "llama", "Llama", (223, 48, 80, 2), (4, 2), head_dim=48,
        rope_parameters=_YARN
        | {"truncate": False, "mscale": 0.8, "mscale_all_dim": 1.2, "beta_fast": 20, "beta_slow": 2},
    ),
    "yarn_attention_factor": _config(
        "llama", "Llama", (227, 48, 80, 2), (4, 2), rope_parameters=_YARN | {"attention_factor": 0.9}
    ),
    "dynamic": _config(
        "llama", "Llama", (229, 48, 80, 2), (4, 2),
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    # Its original context is shorter than the goldens' texts.
    "phi3_long": _config(
        "phi3", "Phi3", (233, 64, 92, 2), (4, 2), max_position_embeddings=256, original_max_position_embeddings=32,
        sliding_window=21,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.05, 1.1, 1.3, 1.5, 2.0, 2.5, 2.6],
            "long_factor": [1.1, 2.0, 3.0, 4.5, 5.0, 6.0, 9.0, 11.0],
        },
    ),
}  # fmt: skip
