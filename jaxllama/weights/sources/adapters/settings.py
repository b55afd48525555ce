"""adapter_config.json: what it asks for is computed, or refused by name.

Source: LoraConfig and check_target_module_exists of peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxllama.errors import ConversionError, quote
from jaxllama.weights.sources.patterns import compile_pattern

ALL_LINEAR = "all-linear"
# Training, initialisation and bookkeeping: nothing that the merged weights depend on.
_HARMLESS = """
    auto_mapping base_model_name_or_path corda_config eva_config inference_mode init_lora_weights layers_pattern
    loftq_config lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size revision
    runtime_config task_type velora_config
"""
_READ = """
    alpha_pattern bias ensure_weight_tying exclude_modules fan_in_fan_out layers_to_transform lora_alpha lora_bias
    modules_to_save r rank_pattern target_modules use_dora use_rslora
"""
_UNDERSTOOD = frozenset((_HARMLESS + _READ).split())
# Why they are not merged.
_REFUSED = {
    "alora_invocation_tokens": "it is in force after some tokens only, and cannot be merged",
    "arrow_config": "it routes tokens between adapters, and cannot be merged",
    "kasa_config": "it changes the base's weights too",
    "layer_replication": "it makes another model of the base",
    "megatron_config": "it is for Megatron's layers",
    "monteclora_config": "it draws its weights at random",
    "target_parameters": "it is for parameters that are no module's",
    "trainable_token_indices": "rows of the embedding alone are not merged; train with modules_to_save",
    "use_bdlora": "block-diagonal adapters are not merged",
    "use_qalora": "it is for GPTQ's layers",
}
# These leave the base as it is. Others (pissa, olora, corda, loftq) take from its weights what they put into A and B.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter_config.json says. `where` names it in messages; `base` is the model that it was trained on."""

    where: str
    base: str | None
    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    ties: bool

    def rank(self, module: str) -> int:
        """Of the module's A and B."""
        return self.rank_pattern.get(self._key(self.rank_pattern, module), self.r)

    def scaling(self, module: str) -> float:
        """What B times A is multiplied by."""
        rank = self.rank(module)
        alpha = self.alpha_pattern.get(self._key(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_saved(self, module: str) -> bool:
        """Whether the adapter has the module's weights whole."""
        return any(self._compile(rf"(^|.*\.)({name})($|\..*)").match(module) for name in self.saved)

    def is_target(self, module: str) -> bool:
        """Whether the module of that name, `model.layers.0.self_attn.q_proj` or so, has an adapter.

        `targets` None says nothing: then the file alone tells.
        """
        if self._is_named(self.excluded, module) or self.is_saved(module):
            return False
        if self.targets is None:
            return True
        if isinstance(self.targets, str):
            if self.targets.lower() == ALL_LINEAR:
                return module not in ("lm_head", "model.embed_tokens")
            return self._is_named(self.targets, module)
        return self._is_named(self.targets, module) and (not self.layers or self._layer(module) in self.layers)

    def _layer(self, module: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = self._compile(rf"(?:^|.*?\.)({pattern})\.(?P<layer>\d+)\.").match(module)
            if found is not None:
                return int(found["layer"])
        return None

    def _is_named(self, names: tuple[str, ...] | str, module: str) -> bool:
        if isinstance(names, str):
            return bool(names) and self._compile(names).fullmatch(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _key(self, patterns: Mapping[str, Any], module: str) -> str:
        """The first pattern that the module's name ends with."""
        return next((key for key in patterns if self._compile(rf"(.*\.)?({key})$").match(module)), module)

    def _compile(self, pattern: str) -> re.Pattern[str]:
        return compile_pattern(pattern, self.where)


def read_settings(value: Mapping[str, Any], where: str) -> AdapterSettings:
    """Reads a parsed adapter_config.json.

    Raises: ConversionError naming what is not understood or not merged.
    """
    kind = value.get("peft_type")
    if kind != "LORA":
        raise ConversionError(f"{where}: peft_type {quote(kind)} is not supported, expected 'LORA'")
    task = value.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ConversionError(f"{where}: task_type {quote(task)} is not supported, expected 'CAUSAL_LM'")
    for key, why in _REFUSED.items():
        if _means_something(value.get(key)):
            raise ConversionError(f"{where}: {key} {quote(value[key])} is not supported: {why}")
    init = value.get("init_lora_weights")
    if init not in _INITS:
        raise ConversionError(
            f"{where}: init_lora_weights {quote(init)} is not supported: it changes the base's weights too. Save the "
            "adapter as an ordinary one (path_initial_model_for_weight_conversion)"
        )
    unknown = [key for key, item in value.items() if key not in _UNDERSTOOD and _means_something(item)]
    if unknown:
        raise ConversionError(f"{where}: not understood: {', '.join(sorted(map(quote, unknown)))}")
    if value.get("bias", "none") not in (None, "none", "all", "lora_only"):
        raise ConversionError(f"{where}: bias {quote(value['bias'])} is not supported, expected none, all or lora_only")
    layers = value.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    return AdapterSettings(
        where=where,
        base=value.get("base_model_name_or_path") if isinstance(value.get("base_model_name_or_path"), str) else None,
        r=_rank(value.get("r", 8), "r", where),
        alpha=_number(value.get("lora_alpha", 8), "lora_alpha", where),
        rank_pattern={key: _rank(n, "rank_pattern", where) for key, n in _mapping(value, "rank_pattern", where)},
        alpha_pattern={key: _number(n, "alpha_pattern", where) for key, n in _mapping(value, "alpha_pattern", where)},
        use_rslora=_boolean(value, "use_rslora", where),
        use_dora=_boolean(value, "use_dora", where),
        targets=_names(value, "target_modules", where, None),
        excluded=_names(value, "exclude_modules", where, ()) or (),
        layers=_layers(layers, where),
        layers_pattern=_listed(_names(value, "layers_pattern", where, ()) or ()),
        saved=_listed(_names(value, "modules_to_save", where, ()) or ()),
        ties=_boolean(value, "ensure_weight_tying", where),
    )


def _means_something(value: Any) -> bool:
    return value is not None and value is not False and value not in ({}, [], "")


def _rank(value: Any, key: str, where: str) -> int:
    if type(value) is not int or value < 1:
        raise ConversionError(f"{where}: {key} must be a positive integer, got {quote(value)}")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConversionError(f"{where}: {key} must be a number, got {quote(value)}")
    return float(value)


def _boolean(value: Mapping[str, Any], key: str, where: str) -> bool:
    found = value.get(key)
    if found not in (None, True, False):
        raise ConversionError(f"{where}: {key} must be true or false, got {quote(found)}")
    return bool(found)


def _mapping(value: Mapping[str, Any], key: str, where: str) -> Iterable[tuple[str, Any]]:
    found = value.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConversionError(f"{where}: {key} must be an object, got {quote(found)}")
    return found.items()


def _names[T](value: Mapping[str, Any], key: str, where: str, missing: T) -> tuple[str, ...] | str | T:
    found = value.get(key)
    if found is None:
        return missing
    if isinstance(found, str):
        return found
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConversionError(f"{where}: {key} must be a text or a list of names, got {quote(found)}")
    return tuple(found)


def _listed(names: tuple[str, ...] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _layers(value: Any, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise ConversionError(f"{where}: layers_to_transform must be a list of layers, got {quote(value)}")
    return tuple(value)
