"""What each architecture has that a Llama has not: one row each. What is not here is refused by name.

Source: the `modeling_*.py` and `configuration_*.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

type QkNorm = Literal["head", "projection"]
type Windows = Literal["none", "every_layer", "by_layer"]


@dataclass(frozen=True)
class Family:
    """One architecture, by its names in config.json. The defaults are a Llama's.

    `biases` are projections with a bias whatever config.json says. `qk_norm`: queries and keys are normalised before
    they are rotated, each head by itself, or the whole projection. `norms_outputs`: blocks normalise what they put out,
    not what they take in. `is_fused`: q, k and v are stored as one tensor, gate and up as another. `windows`: whether
    `sliding_window` is of no layer, of every layer, or of those that `layer_types` names. `reads` are keys of
    config.json that others must not set; `defaults` are transformers' values of keys that config.json may leave out.
    """

    architecture: str
    model_type: str
    biases: tuple[str, ...] = ()
    qk_norm: QkNorm | None = None
    norms_outputs: bool = False
    is_fused: bool = False
    windows: Windows = "none"
    reads: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN_WINDOW = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}

_ROWS = (
    Family("LlamaForCausalLM", "llama", reads=("attention_bias", "mlp_bias")),
    Family(
        "MistralForCausalLM",
        "mistral",
        windows="every_layer",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    Family(
        "MinistralForCausalLM",
        "ministral",
        windows="by_layer",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    # R1-Distill-Qwen 1.5B to 32B, Qwen2 and 2.5.
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        biases=("q_proj", "k_proj", "v_proj"),
        windows="by_layer",
        defaults={**_QWEN_WINDOW, "num_key_value_heads": 32},
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        qk_norm="head",
        windows="by_layer",
        reads=("attention_bias",),
        defaults={**_QWEN_WINDOW, "num_key_value_heads": 32, "head_dim": 128},
    ),
    # Phi-3, Phi-4 and their minis.
    Family("Phi3ForCausalLM", "phi3", is_fused=True, windows="every_layer", reads=("partial_rotary_factor",)),
    Family(
        "GraniteForCausalLM",
        "granite",
        reads=(
            "attention_bias",
            "mlp_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "logits_scaling",
            "residual_multiplier",
        ),
        defaults={"attention_multiplier": 1.0},
    ),
    Family("Olmo2ForCausalLM", "olmo2", qk_norm="projection", norms_outputs=True, reads=("attention_bias",)),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        windows="by_layer",
        reads=("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
        defaults={
            "use_sliding_window": False,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        },
    ),
)
FAMILIES: Mapping[str, Family] = {family.architecture: family for family in _ROWS}
"""By architecture, as config.json names it."""
BY_MODEL_TYPE: Mapping[str, Family] = {family.model_type: family for family in _ROWS}
