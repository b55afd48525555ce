"""What a model is, from its headers and texts alone: no weights are read, wherever they are."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxllama.errors import ConfigError, JaxLlamaError, PlaceError, StoreError, one_line
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import num_params, param_specs, stored_specs
from jaxllama.system.strict_json import parse_object
from jaxllama.text.chat import ChatTemplate, has_chat_template, load_chat_template
from jaxllama.text.encoding.tokenizer import load_tokenizer
from jaxllama.weights.checkpoint import MANIFEST, Checkpoint
from jaxllama.weights.places import Place, PlaceLike, open_place
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.safetensors import SIDECARS
from jaxllama.weights.sources.source import Source

_PROBE = "5f1d"


@dataclass
class Inspection:
    """What a model is. `kind` is "jaxllama", "safetensors" or "gguf".

    `dtypes` has tensors and bytes by what they are stored as. `problems` are why it would be refused; what could not be
    found out because of them is None or empty. Texts are None where the model has none.
    """

    place: str
    kind: str
    architecture: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    num_params: int | None = None
    num_bytes: int | None = None
    dtypes: dict[str, dict[str, int]] = field(default_factory=dict)
    quantization: str | None = None
    rope: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    chat_template: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect(place: PlaceLike) -> Inspection:
    """Looks at a model. What would be refused is said, not raised.

    Raises: PlaceError when there is nothing, or it may not be read; StoreError.
    """
    with contextlib.closing(open_place(place)) as opened, TemporaryDirectory(prefix="jaxllama-") as scratch:
        names = [opened.file] if opened.file else opened.names()
        is_checkpoint = opened.file is None and MANIFEST in names
        kind = "jaxllama" if is_checkpoint else "safetensors"
        if not is_checkpoint and not any(name.endswith(".safetensors") for name in names):
            kind = "gguf" if any(name.endswith(".gguf") for name in names) else "safetensors"
        found = Inspection(opened / opened.file if opened.file else opened.where, kind)
        look = _Look(found, opened, Path(scratch))
        if is_checkpoint:
            look.at_checkpoint()
        else:
            look.at_source()
        look.at_texts()
        return found


class _Look:
    """Fills an inspection in, step by step; a step that fails leaves its reason."""

    def __init__(self, found: Inspection, place: Place, folder: Path) -> None:
        self.found = found
        self.place = place
        self.folder = folder
        self.config: LlamaConfig | None = None

    def at_checkpoint(self) -> None:
        found = self.found
        checkpoint = self._try(lambda: Checkpoint.open(self.place))
        if checkpoint is None:
            self._copy_texts()
            self._read_config(self._raw_config())
            return
        self.folder = checkpoint.path
        self._keep = checkpoint
        self._read_config(self._raw_config())
        self.config = checkpoint.config
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for part in [p for s in param_specs(self.config) for p in stored_specs(s, checkpoint.manifest.quantize)]:
            dtype = part.dtype or checkpoint.dtype
            counts[dtype] += 1
            sizes[dtype] += part.size * {"bfloat16": 2, "float32": 4, "int8": 1}[dtype]
        found.dtypes = {name: {"tensors": counts[name], "bytes": sizes[name]} for name in counts}
        found.num_bytes = sum(sizes.values())
        found.quantization = checkpoint.manifest.quantize

    def at_source(self) -> None:
        found = self.found
        raw = self._raw_config() if self.place.file is None and found.kind != "gguf" else {}
        quantization = raw.get("quantization_config")
        if isinstance(quantization, Mapping):
            found.quantization = one_line(quantization.get("quant_method"), 100)
        source = self._try(lambda: open_source(self.place))
        if source is None:
            self._copy_texts()
            self._read_config(raw)
            return
        for name, data in source.sidecars.items():
            (self.folder / name).write_bytes(data)
        found.warnings += source.warnings
        self._read_config(source.config)
        self._read_tensors(source)

    def at_texts(self) -> None:
        found, folder = self.found, self.folder
        found.generation = dict(self._try(lambda: _object(folder / "generation_config.json")) or {})
        files = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]
        if not files:
            found.warnings.append("has no tokenizer: it takes and gives token ids only")
            return
        size = self.config.vocab_size if self.config else 2**31
        tokenizer = self._try(lambda: load_tokenizer(folder, size))
        if tokenizer is not None:
            found.tokenizer = {
                "file": files[0],
                "vocab_size": tokenizer.vocab_size,
                "special_tokens": len(tokenizer.specials),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            }
        if not has_chat_template(folder):
            found.warnings.append("has no chat template: it completes text, and cannot chat")
            return
        try:
            found.chat_template = _abilities(load_chat_template(folder))
        except JaxLlamaError as error:
            found.warnings.append(f"cannot chat: {one_line(error, 500)}")

    def _read_tensors(self, source: Source) -> None:
        found = self.found
        for tensor in source.tensors.values():
            entry = found.dtypes.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
            entry["tensors"] += 1
            entry["bytes"] += tensor.num_bytes
        found.num_bytes = sum(file.size for file in source.files)
        if self.config is not None:
            config = self.config
            self._try(lambda: match_tensors(config, source.tensors, source.name, reads=False))
        if found.kind == "gguf":
            floats = ("F32", "F16", "BF16")
            blocks = sorted(name for name in found.dtypes if name not in floats)
            found.quantization = ", ".join(blocks) or None

    def _read_config(self, raw: Mapping[str, Any]) -> None:
        found = self.found
        architectures = raw.get("architectures")
        if isinstance(architectures, list) and architectures:
            found.architecture = one_line(architectures[0], 100)
        config = self.config = self._try(lambda: LlamaConfig.from_hf(raw)) if raw else None
        if config is None:
            return
        found.num_params = num_params(config)
        found.model = {
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "tied_embeddings": config.tie_word_embeddings,
            "context": config.max_position_embeddings,
            "windows": len([window for window in config.windows if window]),
        }
        rope = config.rope
        found.rope = {"type": rope.rope_type, "theta": rope.theta}
        if rope.rope_type != "default":
            found.rope |= {"factor": rope.factor, "original_context": rope.original_max_position_embeddings}

    def _raw_config(self) -> Mapping[str, Any]:
        def read() -> Mapping[str, Any]:
            data = self.place.read("config.json")
            if data is None:
                return {}
            return parse_object(data, self.place / "config.json", ConfigError)

        return self._try(read) or {}

    def _copy_texts(self) -> None:
        for name in SIDECARS if self.place.file is None else ():
            if (data := self._try(functools.partial(self.place.read, name))) is not None:
                (self.folder / name).write_bytes(data)

    def _try[T](self, step: Callable[[], T]) -> T | None:
        try:
            return step()
        except StoreError:
            raise
        except PlaceError as error:
            if self.place.file is None and self.place.names():
                self._refuse(error)
                return None
            raise
        except JaxLlamaError as error:
            self._refuse(error)
            return None

    def _refuse(self, error: JaxLlamaError) -> None:
        reason = one_line(error, 4000)
        if reason not in self.found.problems:
            self.found.problems.append(reason)


def _object(path: Path) -> Mapping[str, Any]:
    return parse_object(path.read_bytes(), path.name, ConfigError) if path.exists() else {}


def _abilities(template: ChatTemplate) -> dict[str, Any]:
    """What a template does with messages, found by rendering some."""
    system = {"role": "system", "content": f"system {_PROBE}"}
    user = {"role": "user", "content": "user"}
    try:
        shows_system = _PROBE in str(template.render([system, user]).text)
    except JaxLlamaError:
        shows_system = False
    with_tools = template.variant(with_tools=True)
    return {
        "system": shows_system,
        "tools": "native" if "tools" in with_tools.variables else "described in the system message",
        "tool_format": with_tools.tool_format.name,
        "reasoning": template.has_reasoning,
        "variables": sorted(set(template.variables) - template.own_variables),
    }
