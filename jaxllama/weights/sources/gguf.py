"""Makes a Hugging Face model of a GGUF file: names, config.json, generation_config.json, tokenizer, chat template."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllama.errors import ConfigError, ConversionError, listed, one_line, quote
from jaxllama.model.config.families import BY_MODEL_TYPE
from jaxllama.weights.places import Place
from jaxllama.weights.sources.gguf_file import GgufHeader, GgufTensor, read_gguf_header
from jaxllama.weights.sources.gguf_tokenizer import tokenizer_files
from jaxllama.weights.sources.source import Source, SourceFile, SourceTensor

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_OF_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ROPE_FREQS = "rope_freqs.weight"
_SHORT_FACTORS, _LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp's converter writes of one family otherwise than of a Llama.

    `permutes`: rows of q and k are in the interleaved rotary order. `modules` are the tensors of a layer. `keys` are
    further keys of the metadata, and what config.json calls them. `rotates_part`: `rope.dimension_count` may be less
    than a head.
    """

    permutes: bool = False
    modules: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    keys: Mapping[str, str] = field(default_factory=dict)
    rotates_part: bool = False


# Source: the converter of llama.cpp, `conversion/*.py` and `undo_permute` there.
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture(permutes=True),
    "qwen2": _Architecture(),
    "qwen3": _Architecture(modules=_BLOCK | _NORMS_OF_HEADS),
    "phi3": _Architecture(
        modules={name: _BLOCK[name] for name in ("attn_norm", "attn_output", "ffn_norm", "ffn_down")}
        | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        keys={"attention.sliding_window": "sliding_window"},
        rotates_part=True,
    ),
    "granite": _Architecture(
        permutes=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "olmo2": _Architecture(
        modules={name: module for name, module in _BLOCK.items() if not name.endswith("_norm")}
        | _NORMS_OF_HEADS
        | {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    ),
    "smollm3": _Architecture(permutes=True),
}
# Keys of an architecture that are read here, or that do not change what the model computes.
_KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout", "expert_count",
    "expert_used_count",
}  # fmt: skip
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_BETAS = ("beta_fast", "beta_slow")
# The parameters of every published Llama 3.1, 3.2 and 3.3; GGUF stores only the frequencies that result.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192
_FREQUENCY_TOLERANCE = 1e-4


def open_gguf(place: Place, name: str) -> Source:
    """Opens a GGUF file of a family in `_ARCHITECTURES`.

    Raises: ConversionError or ConfigError naming the file, the key or tensor, and the reason.
    """
    path = place / name
    files = tuple(SourceFile(place, part) for part in part_names(name))
    headers = [read_gguf_header(file) for file in files]
    _check_parts(files, headers)
    file = files[0]
    # The first part has the metadata; tensors may be in any.
    header = GgufHeader(headers[0].metadata, {name: t for part in headers for name, t in part.tensors.items()})
    architecture: Any = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: architecture {quote(architecture)} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    config = _config(header, file, architecture)
    sidecars, warnings = tokenizer_files(header.metadata, config["vocab_size"], path)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    json_files = {"config.json": config, "generation_config.json": generation}
    return Source(
        kind="gguf",
        name=name,
        config=config,
        tensors={
            name: tensor
            for part, part_header in zip(files, headers, strict=True)
            for name, tensor in _tensors(part_header, part, config, _ARCHITECTURES[architecture]).items()
        },
        files=files,
        sidecars={**{name: _json_bytes(value) for name, value in json_files.items()}, **sidecars},
        warnings=tuple(warnings),
    )


def part_names(name: str) -> tuple[str, ...]:
    """The names of all files of a model, given that of one: itself, or as many as `-00001-of-00003.gguf` says.

    Raises: ConversionError for a number that cannot be.
    """
    match = _PART.search(name)
    if match is None:
        return (name,)
    number, count = int(match[1]), int(match[2])
    if not 1 <= number <= count:
        raise ConversionError(f"{name}: is no part of {count}")
    return tuple(f"{name[: match.start()]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1))


def _check_parts(files: tuple[SourceFile, ...], headers: list[GgufHeader]) -> None:
    """Raises: ConversionError when the files are not the parts of one model, each in its place."""
    found: dict[str, str] = {}
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        wanted = {"split.no": number, "split.count": len(files)}
        for key, value in wanted.items():
            # Files that are whole may say nothing of parts, or that they are the only one.
            if (got := header.metadata.get(key, value if len(files) == 1 else None)) != value:
                if len(files) == 1 and key == "split.count" and got == 0:
                    continue
                raise ConversionError(f"{file.path}: {key} is {got}, expected {value}: was the file renamed?")
        for name in header.tensors:
            if name in found:
                raise ConversionError(f"{file.path}: {name!r} is in {found[name]}, too")
            found[name] = file.name
    total = headers[0].metadata.get("split.tensors.count", len(found))
    if total != len(found):
        raise ConversionError(f"{files[0].path}: split.tensors.count is {total}, but the parts have {len(found)}")


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _config(header: GgufHeader, file: SourceFile, name: str) -> dict[str, Any]:
    family, architecture = BY_MODEL_TYPE[name], _ARCHITECTURES[name]
    read = _Reader(header.metadata, name, file.path)
    num_heads = read.integer("attention.head_count")
    num_kv_heads = read.integer("attention.head_count_kv", num_heads)
    hidden_size = read.integer("embedding_length")
    head_dim = read.integer("attention.key_length", hidden_size // num_heads)
    rotary_dim = read.integer("rope.dimension_count", head_dim)
    for key in ("attention.value_length", "rope.dimension_count"):
        is_part = key == "rope.dimension_count" and architecture.rotates_part and rotary_dim < head_dim
        if read.integer(key, head_dim) != head_dim and not is_part:
            raise ConfigError(
                f"{file.path}: {name}.{key} is {read.integer(key)}, only head_dim ({head_dim}) is supported"
            )
    if read.integer("expert_count", 0):
        raise ConfigError(f"{file.path}: mixture-of-experts models are not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConversionError(f"{file.path}: missing token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": read.integer("feed_forward_length"),
        "num_hidden_layers": read.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest_float32(read.number("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": read.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_theta": _shortest_float32(read.number("rope.freq_base", 10_000.0)),
        "rope_scaling": None,
        **_special_ids(header.metadata, embedding.shape[0], file.path),
        **{key: _has_bias(header, key) for key in ("attention_bias", "mlp_bias") if key in family.reads},
        **_further(read, architecture),
    }
    if rotary_dim < head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    if name == "granite":
        # llama.cpp's default, where transformers' is 1.
        config.setdefault("attention_multiplier", head_dim**-0.5)
    config["rope_scaling"] = _rope_scaling(read, header, file, config)
    read.refuse_unknown()
    return config


def _has_bias(header: GgufHeader, key: str) -> bool:
    names = {"attention_bias": ("attn_q", "attn_qkv"), "mlp_bias": ("ffn_gate",)}[key]
    return any(f"blk.0.{name}.bias" in header.tensors for name in names)


def _further(read: _Reader, architecture: _Architecture) -> dict[str, Any]:
    """What only this family has; a window of 0 is none."""
    found: dict[str, Any] = {}
    for key, ours in architecture.keys.items():
        if not read.has(key):
            continue
        found[ours] = (read.integer(key, 0) or None) if ours == "sliding_window" else read.rounded(key)
    return found


def _special_ids(metadata: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    found: dict[str, int] = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.get(key)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ConfigError(f"{where}: {key} must be below the vocabulary size ({vocab_size}), got {quote(value)}")
        found[name] = value
    ends = list(dict.fromkeys(found[name] for name in ("eos", "eot", "eom") if name in found))
    ids: dict[str, Any] = {"bos_token_id": found["bos"]} if "bos" in found else {}
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return {**ids, "pad_token_id": found["padding"]} if "padding" in found else ids


def _rope_scaling(
    read: _Reader, header: GgufHeader, file: SourceFile, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    if _SHORT_FACTORS in header.tensors:
        return _longrope_scaling(read, header, file, config)
    kind = read.get("rope.scaling.type", "none")
    # `rope.scale_linear` is the older name of the linear factor.
    factor = read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{file.path}: rope scaling {quote(kind)} is not supported; supported: none, linear, yarn, llama3 (by "
            "rope_freqs), longrope (by rope_factors_short)"
        )
    frequencies = header.tensors.get(_ROPE_FREQS)
    if frequencies is not None:
        if kind != "none":
            raise ConfigError(
                f"{file.path}: has both rope scaling {quote(kind)} and {_ROPE_FREQS}, of which one is supported"
            )
        return _llama3_scaling(
            frequencies, file, config, read.integer("rope.scaling.original_context_length", _LLAMA3_ORIGINAL)
        )
    if kind == "yarn":
        original = read.integer("rope.scaling.original_context_length")
        betas = {
            name: read.rounded(f"rope.scaling.yarn_{name}") for name in _BETAS if read.has(f"rope.scaling.yarn_{name}")
        }
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    if kind == "none" and read.has("rope.scaling.type"):
        return None
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _longrope_scaling(read: _Reader, header: GgufHeader, file: SourceFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Source: `generate_extra_tensors` of Phi-3 in llama.cpp's converter."""
    half = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)) // 2
    divisors = {}
    for name, ours in ((_SHORT_FACTORS, "short_factor"), (_LONG_FACTORS, "long_factor")):
        tensor = header.tensors.get(name)
        if tensor is None or tensor.dtype != "F32" or tensor.shape != (half,):
            got = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ConversionError(f"{file.path}: {name} is {got}, expected F32 {[half]}")
        values = file.read(tensor.offset, tensor.num_bytes).view("<f4")
        divisors[ours] = [_shortest_float32(value) for value in values]
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": read.integer("rope.scaling.original_context_length"),
        "attention_factor": read.number("rope.scaling.attn_factor"),
        **divisors,
    }


def _llama3_scaling(
    tensor: GgufTensor, file: SourceFile, config: Mapping[str, Any], original: int
) -> dict[str, Any] | None:
    """The llama3 parameters that give exactly these divisors of the rotary frequencies.

    Source: `rope_freqs` of llama.cpp divides the frequencies; the formula is Llama 3.1's.
    """
    half = config["head_dim"] // 2
    if tensor.dtype != "F32" or tensor.shape != (half,):
        raise ConversionError(
            f"{file.path}: {_ROPE_FREQS} is {tensor.dtype} {list(tensor.shape)}, expected F32 {[half]}"
        )
    divisors = file.read(tensor.offset, tensor.num_bytes).view("<f4").astype(np.float64)
    if np.all(divisors == 1.0):
        return None
    factor = round(float(divisors[-1]), 4)
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    smooth = (original / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    want = 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1)) if factor >= 1 else np.zeros(half)
    if not np.allclose(divisors, want, rtol=_FREQUENCY_TOLERANCE, atol=0):
        raise ConfigError(
            f"{file.path}: {_ROPE_FREQS} does not follow from llama3 scaling with factor {factor}, low 1, high 4 and "
            f"original context {original}; convert from the safetensors of this model instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": original,
    }


def _tensors(
    header: GgufHeader, file: SourceFile, config: Mapping[str, Any], architecture: _Architecture
) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for tensor in header.tensors.values():
        if tensor.name in (_ROPE_FREQS, _SHORT_FACTORS, _LONG_FACTORS):
            continue
        heads = None
        if architecture.permutes and (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            # A wrong number of rows is reported with every other misfit by match_tensors.
            heads = heads if tensor.shape[0] == heads * config["head_dim"] else None
        name = _hf_name(tensor.name, architecture)
        tensors[name] = SourceTensor(name, file, tensor.offset, tensor.num_bytes, tensor.shape, tensor.dtype, heads)
    return tensors


def _hf_name(name: str, architecture: _Architecture) -> str:
    """The Hugging Face name; an unknown name is kept, to be reported as unexpected."""
    if match := re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", name):
        if match[2] in architecture.modules:
            return f"model.layers.{match[1]}.{architecture.modules[match[2]]}.{match[3]}"
    elif (match := re.fullmatch(r"(\w+)\.(weight|bias)", name)) and match[1] in _TOP:
        return f"{_TOP[match[1]]}.{match[2]}"
    return name


def _shortest_float32(value: float) -> float:
    """The decimal a person wrote: GGUF's float32 1e-5 is 9.999999747378752e-06 as a double."""
    return float(str(np.float32(value)))


class _Reader:
    """Typed access to the metadata of one architecture, such as `llama.*`."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self._metadata = metadata
        self._name = architecture
        self._where = where
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        return f"{self._name}.{key}" in self._metadata

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        value = self._metadata.get(f"{self._name}.{key}", default)
        if value is None:
            raise ConfigError(f"{self._where}: metadata {self._name}.{key} is missing")
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise ConfigError(f"{self._where}: {self._name}.{key} differs between layers, which is not supported")
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 <= value < 2**31 or (value == 0 and default != 0):
            raise ConfigError(f"{self._where}: {self._name}.{key} must be a positive integer, got {quote(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{self._where}: {self._name}.{key} must be a positive number, got {quote(value)}")
        return float(value)

    def rounded(self, key: str) -> float:
        return _shortest_float32(self.number(key))

    def refuse_unknown(self) -> None:
        """Raises ConfigError for keys that might change what the model computes and are not understood."""
        prefix, known = f"{self._name}.", _KNOWN_KEYS | self._read
        keys = [key for key in self._metadata if key.startswith(prefix) and key.removeprefix(prefix) not in known]
        if keys:
            raise ConfigError(
                f"{self._where}: metadata is not understood: {listed([one_line(key) for key in sorted(keys)])}"
            )
