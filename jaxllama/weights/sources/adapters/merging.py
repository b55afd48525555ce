"""A model with adapters: every parameter's tensor replaced by what it is with them, in the order of the adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxllama.errors import ConversionError, listed, one_line, quote
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import ParamSpec, param_specs
from jaxllama.weights.places import PlaceLike
from jaxllama.weights.sources.adapters.adapter import Adapter, open_adapter
from jaxllama.weights.sources.adapters.tensors import (
    AdaptedTensor,
    AddedTensor,
    LoraEmbedding,
    LoraTensor,
    adapted,
)
from jaxllama.weights.sources.names import EMBED, LM_HEAD, same_bytes
from jaxllama.weights.sources.safetensors import SIDECARS
from jaxllama.weights.sources.source import FLOATS, Source, SourceTensor
from jaxllama.weights.sources.stored import Pairs

_EMBED_MODULE = "model.embed_tokens"
_HEAD_MODULE = "lm_head"
_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_EMBED_A, _EMBED_B = "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Merged:
    """A model with its adapters. `records` name them and their files' hashes, in order."""

    source: Source
    pairs: Pairs
    records: tuple[Mapping[str, Any], ...]


def merge_adapters(source: Source, pairs: Pairs, places: Iterable[PlaceLike]) -> Merged:
    """The model of `source`, whose parameters are `pairs`, with the adapters at `places`, each on those before it.

    Nothing is computed before rows are read. The config has the vocabulary that an adapter resized, and is not tied any
    more where an adapter has another head than embedding. An adapter's own tokenizer replaces the base's.

    Raises: ConversionError for an adapter of another base, listing all that does not fit; as `open_adapter`.
    """
    records = []
    for place in places:
        adapter = open_adapter(place)
        model = _Model(source, pairs, adapter)
        source, pairs = model.merge()
        records.append(adapter.record)
    return Merged(source, pairs, tuple(records))


class _Model:
    def __init__(self, source: Source, pairs: Pairs, adapter: Adapter) -> None:
        self.source = source
        self.adapter = adapter
        self.base = {spec.hf_key: tensor for spec, tensor in pairs}
        self.saved = dict(adapter.saved)
        self.problems = list(adapter.problems)
        self.warnings: list[str] = []

    def merge(self) -> tuple[Source, Pairs]:
        """The source and its parameters with the adapter."""
        changes = self._changes()
        config = {**self.source.config, **changes}
        specs = param_specs(LlamaConfig.from_hf(config))
        names: dict[str, list[ParamSpec]] = {}
        for spec in specs:
            names.setdefault(spec.hf_name, []).append(spec)
        modules = {name.removesuffix(".weight"): held for name, held in names.items() if len(held[0].shape) == 2}
        self._check(names, modules)
        self._raise()
        pairs = [(spec, self._tensor(spec)) for spec in specs]
        self.problems += [
            f"{spec.hf_name} has shape {list(tensor.shape)}, expected {list(spec.shape)}"
            for spec, tensor in pairs
            if tensor.shape != spec.shape
        ]
        self._raise()
        pairs.sort(key=lambda pair: (pair[1].file.name, pair[1].offset))
        self._warn(pairs)
        warnings = (*self.source.warnings, *self.warnings)
        return replace(self.source, config=config, sidecars=self._sidecars(changes, config), warnings=warnings), pairs

    def _changes(self) -> dict[str, Any]:
        """What config.json says otherwise: the vocabulary's size, and that head and embedding are two."""
        settings, changes = self.adapter.settings, {}
        embed, head = self.saved.get(EMBED), self.saved.get(LM_HEAD)
        if embed is not None and len(embed.shape) == 2 and embed.shape[0] != self.source.config.get("vocab_size"):
            changes["vocab_size"] = embed.shape[0]
        if not LlamaConfig.from_hf(self.source.config).tie_word_embeddings:
            return changes
        if _HEAD_MODULE in self.adapter.lora:
            self.problems.append(
                f"{_HEAD_MODULE} is the embedding in this model, and cannot have an adapter of its own"
            )
        if head is not None and embed is not None and _equal(head, embed):
            del self.saved[LM_HEAD]
        elif head is not None or (embed is not None and settings.is_saved(_EMBED_MODULE) and not settings.ties):
            # Of two copies that were trained, or one and the original, peft's merged model keeps both.
            changes["tie_word_embeddings"] = False
        return changes

    def _check(self, names: Mapping[str, Sequence[ParamSpec]], modules: Mapping[str, Sequence[ParamSpec]]) -> None:
        """Collects all that does not fit the model."""
        settings, lora = self.adapter.settings, self.adapter.lora
        for name, tensor in self.saved.items():
            held = names.get(name)
            if held is None:
                self.problems.append(f"unexpected {one_line(name, 120)}")
            else:
                shape = (sum(spec.shape[0] for spec in held), *held[0].shape[1:])
                self._check_shape(name, tensor, shape)
        for module in lora.keys() - modules.keys():
            self.problems.append(f"unexpected {one_line(module, 120)}")
        whole = {name.rpartition(".")[0] for name in self.saved}
        for module, held in modules.items():
            if settings.is_saved(module) and module not in whole:
                self.problems.append(f"modules_to_save names {module}, which is not in the file")
            if settings.targets is not None and settings.is_target(module) != (module in lora):
                has = "the file has an adapter for" if module in lora else "the file has no adapter for"
                names_it = "does not name it" if module in lora else "names it"
                self.problems.append(f"{has} {module}, target_modules {names_it}")
            elif module in lora:
                self._check_parts(module, held, names)

    def _check_parts(self, module: str, held: Sequence[ParamSpec], names: Mapping[str, Sequence[ParamSpec]]) -> None:
        settings, parts = self.adapter.settings, dict(self.adapter.lora[module])
        rank, out, width = settings.rank(module), sum(spec.shape[0] for spec in held), held[0].shape[1]
        if module == _EMBED_MODULE:
            shapes = {_EMBED_A: (rank, out), _EMBED_B: (width, rank), _MAGNITUDE: (width,)}
        else:
            shapes = {_A: (rank, width), _B: (out, rank), _MAGNITUDE: (out,), _BIAS: (out,)}
        if not settings.use_dora:
            del shapes[_MAGNITUDE]
        bias = parts.get(_BIAS)
        if bias is None or f"{module}.bias" not in names:
            shapes.pop(_BIAS, None)
        for part, shape in shapes.items():
            if part not in parts:
                self.problems.append(f"{module}.{part} is missing")
            else:
                self._check_shape(f"{module}.{part}", parts[part], shape)
        for part in parts.keys() - shapes.keys():
            why = ": the module has no bias" if part == _BIAS else ""
            self.problems.append(f"unexpected {module}.{part}{why}")

    def _check_shape(self, name: str, tensor: SourceTensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            self.problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")

    def _tensor(self, spec: ParamSpec) -> SourceTensor:
        """What the parameter is with the adapter."""
        adapter = self.adapter
        module, _, kind = spec.hf_name.rpartition(".")
        saved = self.saved.get(spec.hf_name)
        if saved is not None:
            tensor = saved if spec.hf_rows is None else saved.part(*spec.hf_rows)
        elif spec.hf_key in self.base:
            tensor = self.base[spec.hf_key]
        else:
            # A head that was tied and is not any more.
            tensor = self.base[EMBED, None]
        parts = adapter.lora.get(module)
        if parts is None:
            return tensor
        first_row = spec.hf_rows[0] if spec.hf_rows else 0
        scaling, magnitude = adapter.settings.scaling(module), parts.get(_MAGNITUDE)
        if kind == "bias":
            if _BIAS not in parts:
                return tensor
            more: dict[str, Any] = {"added": parts[_BIAS], "first_row": first_row}
            return adapted(AddedTensor, tensor, factors=adapter.factors, scaling=scaling, **more)
        how: dict[str, Any] = {"factors": adapter.factors, "scaling": scaling, "magnitude": magnitude}
        if module == _EMBED_MODULE:
            return adapted(LoraEmbedding, tensor, left=parts[_EMBED_A], right=parts[_EMBED_B], **how)
        return adapted(LoraTensor, tensor, left=parts[_B], right=parts[_A], first_row=first_row, **how)

    def _raise(self) -> None:
        if self.problems:
            base = self.adapter.settings.base
            trained = f"it was trained on {quote(base)}" if base else "on which model was it trained?"
            raise ConversionError(
                f"{self.adapter.where}: {len(self.problems)} thing(s) do not fit {self.source.name}: "
                f"{listed(self.problems)}. Is this the adapter's base? ({trained})"
            )

    def _warn(self, pairs: Pairs) -> None:
        base, name = self.adapter.settings.base, self.source.name
        if base and "/" in base and "/" in name and base != name:
            self.warnings.append(
                f"{self.adapter.where}: was trained on {one_line(base, 100)}, and is merged into {name}"
            )
        coarse = {t.base.dtype for _, t in pairs if isinstance(t, AdaptedTensor) and t.base.dtype not in FLOATS}
        if coarse:
            kinds = " and ".join(sorted(coarse))
            self.warnings.append(
                f"{self.adapter.where}: is merged into matrices that are {kinds}, once they are dequantised; what is "
                "stored is rounded anew"
            )
        is_tied = not any(spec.hf_name == LM_HEAD for spec, _ in pairs)
        if is_tied and _EMBED_MODULE in self.adapter.lora:
            self.warnings.append(
                f"{self.adapter.where}: adapts the embedding, which is the head too: both change, as when peft merges"
            )

    def _sidecars(self, changes: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, bytes]:
        sidecars = dict(self.source.sidecars)
        if changes:
            sidecars["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        if self.adapter.sidecars:
            kept = {
                name: data
                for name, data in sidecars.items()
                if name not in SIDECARS or name == "generation_config.json"
            }
            sidecars = {**kept, **self.adapter.sidecars}
        return sidecars


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and same_bytes(a, b)
