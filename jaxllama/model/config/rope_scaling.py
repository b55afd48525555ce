"""How rotary frequencies are derived, as config.json says it in the two spellings of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxllama.errors import ConfigError, quote
from jaxllama.model.config.values import boolean, is_number, positive, positive_int

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
_ROPE_TYPES: tuple[RopeType, ...] = get_args(RopeType)
_NAMES = "rope_scaling"


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are derived.

    `default` reads `theta` alone; so does `dynamic`, which differs only beyond the model's context, where nothing is
    served. `linear` reads `factor` too. `llama3` and `yarn` read what is named after their papers' symbols.
    `longrope` divides frequency i by `divisors[i]`; by `long_divisors[i]` where a context is served that is longer than
    the original one (`LlamaConfig.for_context`). Cosines and sines are multiplied by `attention_factor`.
    """

    theta: float = 10_000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> RopeScaling:
        """Reads `rope_parameters` (transformers ≥ 5) or `rope_theta` and `rope_scaling` (before).

        Raises: ConfigError for a rope type that is not implemented, or a missing or misplaced number.
        """
        scaling = scaling_of(hf)
        if not {"rope_type", "type"} & set(scaling) and set(scaling) - {"rope_theta", "partial_rotary_factor"}:
            raise ConfigError(f"config.json: rope_scaling has no rope_type: {quote(dict(scaling))}")
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if hf.get("model_type") == "phi3" and rope_type in ("su", "yarn"):
            rope_type = "longrope"  # its names before transformers 4.43
        if rope_type not in _ROPE_TYPES:
            raise ConfigError(
                f"config.json: rope type {quote(rope_type)} is not supported; supported: {', '.join(_ROPE_TYPES)}"
            )
        theta = positive("rope_theta", scaling.get("rope_theta", hf.get("rope_theta", 10_000.0)))
        read = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}.get(rope_type)
        return cls(theta=theta, rope_type=rope_type, **({} if read is None else read(hf, scaling)))


def scaling_of(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that scales, whichever its name; empty if there is none. Raises: ConfigError."""
    given = [hf[key] for key in ("rope_parameters", "rope_scaling") if hf.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        raise ConfigError("config.json: gives both rope_parameters and rope_scaling, and they differ")
    scaling = given[0] if given else {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_scaling must be an object or null, got {quote(scaling)}")
    return scaling


def _linear(hf: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {"factor": positive(f"{_NAMES}.factor", scaling.get("factor"))}


def _llama3(hf: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    low, high = (positive(f"{_NAMES}.{k}", scaling.get(k)) for k in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ConfigError(
            f"config.json: rope_scaling.high_freq_factor must exceed low_freq_factor, got {high} and {low}"
        )
    return {
        **_linear(hf, scaling),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _original(hf, scaling),
    }


def _yarn(hf: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    original, factor = _original(hf, scaling), _factor(hf, scaling)
    mscale, mscale_all = (_optional(scaling, key) for key in ("mscale", "mscale_all_dim"))
    if (attention_factor := _optional(scaling, "attention_factor")) is None:
        attention_factor = _mscale(factor, 1.0)
        if mscale and mscale_all:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
        "beta_fast": _optional(scaling, "beta_fast") or 32.0,
        "beta_slow": _optional(scaling, "beta_slow") or 1.0,
        "truncates": boolean({"rope_scaling.truncate": scaling.get("truncate", True)}, "rope_scaling.truncate"),
    }


def _mscale(factor: float, scale: float) -> float:
    """Source: Peng et al. 2023, arXiv:2309.00071, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(hf: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Source: Ding et al. 2024, arXiv:2402.13753."""
    original, factor = _original(hf, scaling), _factor(hf, scaling)
    if (attention_factor := _optional(scaling, "attention_factor")) is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
        "divisors": _divisors(scaling, "short_factor"),
        "long_divisors": _divisors(scaling, "long_factor"),
    }


def _divisors(scaling: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = scaling.get(name)
    if not isinstance(values, list) or not values or not all(is_number(value) and value > 0 for value in values):
        raise ConfigError(f"config.json: rope_scaling.{name} must be a list of positive numbers, got {quote(values)}")
    return tuple(map(float, values))


def _original(hf: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    name = "original_max_position_embeddings"
    return positive_int(f"{_NAMES}.{name}", scaling.get(name, hf.get(name)))


def _factor(hf: Mapping[str, Any], scaling: Mapping[str, Any]) -> float:
    """By how much the context was extended, if it is not given by its name."""
    if scaling.get("factor") is not None:
        return positive(f"{_NAMES}.factor", scaling["factor"])
    return positive("max_position_embeddings", hf.get("max_position_embeddings")) / _original(hf, scaling)


def _optional(scaling: Mapping[str, Any], name: str) -> float | None:
    return None if scaling.get(name) is None else positive(f"{_NAMES}.{name}", scaling[name])
