"""The model's dimensions, read from a Hugging Face config.json. No JAX here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxllama.errors import ConfigError, quote
from jaxllama.model.config.families import BY_MODEL_TYPE, FAMILIES, Family, QkNorm
from jaxllama.model.config.rope_scaling import RopeScaling, scaling_of
from jaxllama.model.config.values import boolean, is_number, per_layer, positive, positive_int, token_ids

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
    "attention_bias": (False,),
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
    "mlp_bias": (False,),
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
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
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
    "max_window_layers",
    "no_rope_layers",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "rotary_dim",
    "sliding_window",
    "use_sliding_window",
)
# Phi-3 was published with code of its own; transformers has the same model, and so have we.
_WITH_CODE_OF_THEIR_OWN = ("Phi3ForCausalLM",)
KNOWN_KEYS = frozenset({*_READ, *_NEUTRAL, *_CHECKED})
"""The keys of config.json that are read, and those that are refused where they would change the computation."""


_DEFAULT_ROPE = RopeScaling()


@dataclass(frozen=True)
class LlamaConfig:
    """A model of one of `FAMILIES`. Hashable, so it can be static under `jax.jit`. The defaults are a Llama's.

    `eos_token_ids` are the ids that end a reply; a checkpoint's generation_config.json overrides config.json's.
    `attention_bias` is of the q, k and v projections, `o_proj_bias` of the one after attention. `windows` has, for each
    layer, how many tokens back a query sees, itself included, and 0 for all; empty: all layers see all.
    `rotates` says which layers rotate queries and keys; empty: all do. `rotary_dim` dimensions of a head are rotated.
    The embedding, what a block adds to the residual stream, and queries times keys are multiplied; logits are divided.
    `extended_context` is the context beyond `max_position_embeddings` that `for_context` gives (longrope).
    `is_fused` is of the source: it stores q, k and v as one tensor, gate and up as another.
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
    rope: RopeScaling = _DEFAULT_ROPE
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    o_proj_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    qk_norm: QkNorm | None = None
    norms_outputs: bool = False
    windows: tuple[int, ...] = ()
    rotates: tuple[bool, ...] = ()
    partial_rotary_factor: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_divisor: float = 1.0
    extended_context: int | None = None
    is_fused: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2 or self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"config.json: head_dim ({self.head_dim}) and what of it is rotated ({self.rotary_dim}) must be even, "
                "and the latter no more"
            )
        if self.rope.divisors and len(self.rope.divisors) != self.rotary_dim // 2:
            raise ConfigError(
                f"config.json: rope_scaling.short_factor has {len(self.rope.divisors)} numbers, expected "
                f"{self.rotary_dim // 2}, one for two of the {self.rotary_dim} dimensions that are rotated"
            )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated, the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_scale(self) -> float:
        """What queries times keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def window(self, layer: int) -> int | None:
        """How many tokens back a query of the layer sees, itself included; None: all."""
        return (self.windows[layer] if self.windows else 0) or None

    @property
    def longest_window(self) -> int | None:
        """How many tokens back any layer sees, itself included, if all of them have a window."""
        return max(self.windows) if self.windows and all(self.windows) else None

    @property
    def reach(self) -> int | None:
        """How many tokens back a token's logits depend on, through all layers, if all of them have a window."""
        return None if self.longest_window is None else sum(window - 1 for window in self.windows)

    def for_context(self, max_context: int | None) -> LlamaConfig:
        """The same model for contexts of up to `max_context` tokens; None is what it was first trained for.

        A longrope model has two sets of frequencies: one up to its original context, the other beyond. Which of them it
        is depends on `max_context` alone and not, as in transformers, on how long a text has become: keys that are in
        the cache would be wrong from the original context's last token on. A text of at most that length is computed
        otherwise by a model that serves longer ones; texts beyond it are as in transformers.
        """
        if self.extended_context is None or max_context is None or max_context <= self.max_position_embeddings:
            return self
        rope = dataclasses.replace(self.rope, divisors=self.rope.long_divisors)
        return dataclasses.replace(
            self, rope=rope, max_position_embeddings=self.extended_context, extended_context=None
        )

    def has_rope(self, layer: int) -> bool:
        """Whether the layer rotates queries and keys."""
        return self.rotates[layer] if self.rotates else True

    def cut_to(self, num_layers: int) -> LlamaConfig:
        """The same with its first `num_layers` layers alone."""
        windows, rotates = self.windows[:num_layers], self.rotates[:num_layers]
        return replace(self, num_layers=num_layers, windows=windows, rotates=rotates)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """Reads a parsed config.json.

        Raises: ConfigError naming what is missing, unsupported or inconsistent.
        """
        family = _family(hf)
        hf = {**family.defaults, **hf}
        missing = [key for key in _REQUIRED if hf.get(key) is None]
        if missing:
            raise ConfigError(f"config.json: missing {', '.join(missing)}")
        size = {key: positive_int(key, hf[key]) for key in _REQUIRED if key != "rms_norm_eps"}
        num_heads, num_layers = size["num_attention_heads"], size["num_hidden_layers"]
        head_dim = hf.get("head_dim")
        if head_dim is None and size["hidden_size"] % num_heads:
            raise ConfigError(
                f"config.json: hidden_size ({size['hidden_size']}) is not a multiple of num_attention_heads "
                f"({num_heads}) and head_dim is not given"
            )
        num_kv_heads = hf.get("num_key_value_heads")
        rope = RopeScaling.from_hf(hf)
        longest = context = size["max_position_embeddings"]
        if rope.rope_type == "longrope":
            context = min(context, rope.original_max_position_embeddings)
        bias = "attention_bias" in family.reads and boolean(hf, "attention_bias")
        rotates = _rotates(hf, family, num_layers)
        config = cls(
            vocab_size=size["vocab_size"],
            hidden_size=size["hidden_size"],
            intermediate_size=size["intermediate_size"],
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else positive_int("num_key_value_heads", num_kv_heads),
            head_dim=size["hidden_size"] // num_heads if head_dim is None else positive_int("head_dim", head_dim),
            rms_norm_eps=positive("rms_norm_eps", hf["rms_norm_eps"]),
            max_position_embeddings=context,
            extended_context=longest if longest > context else None,
            rope=rope,
            tie_word_embeddings=boolean(hf, "tie_word_embeddings"),
            attention_bias=bias or "q_proj" in family.biases,
            o_proj_bias=bias,
            mlp_bias="mlp_bias" in family.reads and boolean(hf, "mlp_bias"),
            bos_token_id=_bos_token_id(hf, size["vocab_size"]),
            eos_token_ids=token_ids(hf, "eos_token_id", size["vocab_size"]),
            qk_norm=family.qk_norm,
            norms_outputs=family.norms_outputs,
            windows=_windows(hf, family, num_layers, longest, rotates),
            rotates=rotates,
            partial_rotary_factor=_partial_rotary_factor(hf, family),
            is_fused=family.is_fused,
            **_multipliers(hf, family),
        )
        _check_computation(hf, family, config)
        return config


def _family(hf: Mapping[str, Any]) -> Family:
    architectures = hf.get("architectures") or []
    model_type = hf.get("model_type")
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json: architectures must be a list of names, got {quote(architectures)}")
    if model_type is None and not architectures:
        raise ConfigError("config.json: neither model_type nor architectures is given; expected model_type 'llama'")
    families = [FAMILIES.get(name) if isinstance(name, str) else None for name in architectures]
    if model_type is not None:
        families.append(BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None)
    if None in families:
        named = quote([*architectures, model_type][families.index(None)])
        raise ConfigError(f"config.json: architecture {named} is not supported; supported: {', '.join(FAMILIES)}")
    family = families[0]
    assert family is not None
    if any(other is not family for other in families):
        raise ConfigError(
            f"config.json: architectures {quote(architectures)} and model_type {quote(model_type)} disagree"
        )
    if hf.get("auto_map") and family.architecture not in _WITH_CODE_OF_THEIR_OWN:
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
    return family


def _multipliers(hf: Mapping[str, Any], family: Family) -> dict[str, float]:
    names = {
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "attention_multiplier": "attention_multiplier",
        "logits_scaling": "logits_divisor",
    }
    return {
        ours: positive(name, hf[name])
        for name, ours in names.items()
        if name in family.reads and hf.get(name) is not None
    }


def _partial_rotary_factor(hf: Mapping[str, Any], family: Family) -> float:
    value = scaling_of(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if value in (None, 1):
        return 1.0
    if "partial_rotary_factor" not in family.reads:
        raise ConfigError(
            f"config.json: partial_rotary_factor {quote(value)} is not supported; every dimension of a head is rotated"
        )
    return positive("partial_rotary_factor", value)


def _rotates(hf: Mapping[str, Any], family: Family, num_layers: int) -> tuple[bool, ...]:
    """In `no_rope_layers`, despite its name, 1 stands for a layer that rotates."""
    if "no_rope_layers" not in family.reads:
        return ()
    given = per_layer(hf, "no_rope_layers", num_layers)
    if given is None:
        interval = positive_int("no_rope_layer_interval", hf.get("no_rope_layer_interval"))
        given = [(layer + 1) % interval != 0 for layer in _layers(num_layers)]
    if any(value not in (0, 1) for value in given):
        raise ConfigError(f"config.json: no_rope_layers must be a list of 0 and 1, got {quote(given)}")
    return tuple(map(bool, given))


def _windows(
    hf: Mapping[str, Any], family: Family, num_layers: int, context: int, rotates: tuple[bool, ...]
) -> tuple[int, ...]:
    """Empty if no layer has a window that hides anything."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    if family.windows == "none" or window is None:
        return ()
    window = positive_int("sliding_window", window)
    slides = [True for _ in _layers(num_layers)]
    if family.windows == "by_layer":
        types = per_layer(hf, "layer_types", num_layers)
        if types is not None:
            if any(kind not in ("full_attention", "sliding_attention") for kind in types):
                raise ConfigError(
                    "config.json: layer_types must be 'full_attention' and 'sliding_attention', "
                    f"got {quote(sorted(set(map(str, types))))}"
                )
            slides = [kind == "sliding_attention" for kind in types]
        elif rotates:
            slides = [not rotated for rotated in rotates]
        elif "max_window_layers" in family.defaults:
            first = hf["max_window_layers"]
            slides = [layer >= first for layer in _layers(num_layers)]
    # A window that no context exceeds hides nothing.
    return tuple(window if slide else 0 for slide in slides) if window < context and any(slides) else ()


def _check_computation(hf: Mapping[str, Any], family: Family, config: LlamaConfig) -> None:
    """Refuses what would change the computation and is not computed here, all of it at once."""
    layers = _layers(config.num_layers)
    neutral: dict[str, tuple[Any, ...]] = {
        **_NEUTRAL,
        "attention_multiplier": (config.head_dim**-0.5,),
        "query_pre_attn_scalar": (config.head_dim,),
        "rotary_dim": (config.rotary_dim,),
        "no_rope_layers": ([], [1 for _ in layers]),
    }
    if family.windows != "by_layer":
        neutral["layer_types"] = (["sliding_attention" if config.window(i) else "full_attention" for i in layers],)
    refused = [
        key
        for key, values in neutral.items()
        if key not in family.reads and hf.get(key) is not None and hf[key] not in values
    ]
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    hides_nothing = window is not None and is_number(window) and window >= config.max_position_embeddings
    if family.windows == "none" and window is not None and not hides_nothing:
        refused.append("sliding_window")
    if refused:
        values = ", ".join(f"{key} {quote(hf[key])}" for key in refused)
        raise ConfigError(f"config.json: changes the computation in a way that is not supported: {values}")


def _layers(num_layers: int) -> range:
    """The layers by number; not two billion of them, which a hostile file may claim and a list could not hold."""
    return range(min(num_layers, _MAX_LAYERS_LISTED))


def _bos_token_id(hf: Mapping[str, Any], vocab_size: int) -> int | None:
    ids = token_ids(hf, "bos_token_id", vocab_size)
    if isinstance(hf.get("bos_token_id"), list) and len(ids) != 1:
        raise ConfigError(f"config.json: bos_token_id must be one id, got {quote(hf['bos_token_id'])}")
    return ids[0] if ids else None
