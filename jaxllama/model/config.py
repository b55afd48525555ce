"""The model's dimensions, read from a Hugging Face config.json. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxllama.errors import ConfigError, quote

RopeType = Literal["default", "linear", "llama3"]
_ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "llama3")
# More layers than any model has.
_MAX_LAYERS_LISTED = 10_000
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
# Keys of other models' configs, and the values under which they change nothing; null and an absent key never do.
# Whoever gives one another value does not compute what we would.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "compression_config": ({},),
    "cross_attention_hidden_size": (),
    "cross_attention_layers": ([],),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "logits_soft_cap": (),
    "n_routed_experts": (0,),
    "no_rope_layer_interval": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({},),
    "q_lora_rank": (),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "quantization": ({},),
    "quantization_config": ({},),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "tie_encoder_decoder": (False,),
    "use_alibi": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
_READ = (
    *_REQUIRED,
    "architectures",
    "attention_bias",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "mlp_bias",
    "model_type",
    "num_key_value_heads",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
)
_CHECKED = (
    "attention_multiplier",
    "layer_types",
    "no_rope_layers",
    "query_pre_attn_scalar",
    "rotary_dim",
    "sliding_window",
    "use_sliding_window",
)
KNOWN_KEYS = frozenset({*_READ, *_NEUTRAL, *_CHECKED})
"""The keys of config.json that are read, and those that are refused where they would change the computation."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are derived. `default` ignores everything but `theta`; `linear` reads `factor` too."""

    theta: float = 10_000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> RopeScaling:
        """Reads `rope_parameters` (transformers ≥ 5) or `rope_theta` and `rope_scaling` (before).

        Raises: ConfigError for a rope type that is not implemented, or a missing or misplaced number.
        """
        given = [hf[key] for key in ("rope_parameters", "rope_scaling") if hf.get(key)]
        if len(given) == 2 and given[0] != given[1]:
            raise ConfigError("config.json: gives both rope_parameters and rope_scaling, and they differ")
        scaling = given[0] if given else {}
        if not isinstance(scaling, Mapping):
            raise ConfigError(f"config.json: rope_scaling must be an object or null, got {quote(scaling)}")
        if not {"rope_type", "type"} & set(scaling) and set(scaling) - {"rope_theta", "partial_rotary_factor"}:
            raise ConfigError(f"config.json: rope_scaling has no rope_type: {quote(dict(scaling))}")
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if scaling.get("partial_rotary_factor", 1) != 1:
            raise ConfigError(
                f"config.json: partial_rotary_factor {quote(scaling['partial_rotary_factor'])} is not supported; "
                "every dimension of a head is rotated"
            )
        if rope_type not in _ROPE_TYPES:
            raise ConfigError(
                f"config.json: rope type {quote(rope_type)} is not supported; supported: {', '.join(_ROPE_TYPES)}"
            )
        theta = scaling.get("rope_theta", hf.get("rope_theta", 10_000.0))
        if rope_type == "default":
            return cls(theta=_positive("rope_theta", theta))
        factor = _positive("rope_scaling.factor", scaling.get("factor"))
        if rope_type == "linear":
            return cls(theta=_positive("rope_theta", theta), rope_type="linear", factor=factor)
        low, high = (_positive(f"rope_scaling.{k}", scaling.get(k)) for k in ("low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise ConfigError(
                f"config.json: rope_scaling.high_freq_factor must exceed low_freq_factor, got {high} and {low}"
            )
        original = scaling.get("original_max_position_embeddings")
        return cls(
            theta=_positive("rope_theta", theta),
            rope_type="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=_positive_int("rope_scaling.original_max_position_embeddings", original),
        )


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama-architecture model. Hashable, so it can be static under `jax.jit`.

    `eos_token_ids` are the ids that end a reply; a checkpoint's generation_config.json overrides config.json's.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """Reads a parsed config.json.

        Raises: ConfigError naming what is missing, unsupported or inconsistent.
        """
        _check_architecture(hf)
        missing = [key for key in _REQUIRED if hf.get(key) is None]
        if missing:
            raise ConfigError(f"config.json: missing {', '.join(missing)}")
        size = {key: _positive_int(key, hf[key]) for key in _REQUIRED if key != "rms_norm_eps"}
        num_heads = size["num_attention_heads"]
        head_dim = hf.get("head_dim")
        if head_dim is None and size["hidden_size"] % num_heads:
            raise ConfigError(
                f"config.json: hidden_size ({size['hidden_size']}) is not a multiple of num_attention_heads "
                f"({num_heads}) and head_dim is not given"
            )
        num_kv_heads = hf.get("num_key_value_heads")
        config = cls(
            vocab_size=size["vocab_size"],
            hidden_size=size["hidden_size"],
            intermediate_size=size["intermediate_size"],
            num_layers=size["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else _positive_int("num_key_value_heads", num_kv_heads),
            head_dim=size["hidden_size"] // num_heads if head_dim is None else _positive_int("head_dim", head_dim),
            rms_norm_eps=_positive("rms_norm_eps", hf["rms_norm_eps"]),
            max_position_embeddings=size["max_position_embeddings"],
            rope=RopeScaling.from_hf(hf),
            tie_word_embeddings=_boolean(hf, "tie_word_embeddings"),
            attention_bias=_boolean(hf, "attention_bias"),
            mlp_bias=_boolean(hf, "mlp_bias"),
            bos_token_id=_bos_token_id(hf, size["vocab_size"]),
            eos_token_ids=_token_ids(hf, "eos_token_id", size["vocab_size"]),
        )
        _check_computation(hf, config)
        return config


def _check_architecture(hf: Mapping[str, Any]) -> None:
    architectures = hf.get("architectures") or []
    model_type = hf.get("model_type")
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json: architectures must be a list of names, got {quote(architectures)}")
    others = [name for name in architectures if name != "LlamaForCausalLM"]
    if others or model_type not in (None, "llama"):
        named = quote(others[0] if others else model_type)
        raise ConfigError(
            f"config.json: architecture {named} is not supported; expected LlamaForCausalLM (model_type 'llama')"
        )
    if model_type is None and not architectures:
        raise ConfigError("config.json: neither model_type nor architectures is given; expected model_type 'llama'")
    if hf.get("auto_map"):
        raise ConfigError("config.json: auto_map asks to run code from the model; that is never done")
    for key in ("quantization_config", "quantization", "compression_config"):
        if quantization := hf.get(key):
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            raise ConfigError(
                f"config.json: quantization {quote(method or {key: quantization})} is not supported; "
                "convert from the unquantised weights"
            )
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act {quote(activation)} is not supported; expected 'silu'")


def _check_computation(hf: Mapping[str, Any], config: LlamaConfig) -> None:
    """Refuses what would change the computation and is not computed here, all of it at once."""

    def for_each_layer(value: Any) -> Any:
        # A list of two billion would fill the memory.
        return [value] * min(config.num_layers, _MAX_LAYERS_LISTED)

    neutral: dict[str, tuple[Any, ...]] = {
        **_NEUTRAL,
        "attention_multiplier": (config.head_dim**-0.5,),
        "query_pre_attn_scalar": (config.head_dim,),
        "rotary_dim": (config.head_dim,),
        "layer_types": (for_each_layer("full_attention"),),
        "no_rope_layers": ([], for_each_layer(1)),
    }
    refused = [key for key, values in neutral.items() if hf.get(key) is not None and hf[key] not in values]
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    # A window that no context exceeds hides nothing.
    if window is not None and not (_is_number(window) and window >= config.max_position_embeddings):
        refused.append("sliding_window")
    if refused:
        values = ", ".join(f"{key} {quote(hf[key])}" for key in refused)
        raise ConfigError(f"config.json: changes the computation in a way that is not supported: {values}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {name} must be a positive number, got {quote(value)}")
    return float(value)


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"config.json: {name} must be a positive integer, got {quote(value)}")
    return value


def _boolean(hf: Mapping[str, Any], name: str) -> bool:
    value = hf.get(name)
    if value not in (None, True, False):
        raise ConfigError(f"config.json: {name} must be true or false, got {quote(value)}")
    return bool(value)


def _bos_token_id(hf: Mapping[str, Any], vocab_size: int) -> int | None:
    ids = _token_ids(hf, "bos_token_id", vocab_size)
    if isinstance(hf.get("bos_token_id"), list) and len(ids) != 1:
        raise ConfigError(f"config.json: bos_token_id must be one id, got {quote(hf['bos_token_id'])}")
    return ids[0] if ids else None


def _token_ids(hf: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    value = hf.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ConfigError(f"config.json: {name} must be below vocab_size ({vocab_size}), got {quote(token_id)}")
    return tuple(ids)
