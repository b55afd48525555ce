"""Makes a Hugging Face model of a GGUF file: names, config.json, generation_config.json, tokenizer, chat template."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllama.errors import ConfigError, ConversionError, listed, one_line, quote
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
_ROPE_FREQS = "rope_freqs.weight"
# Keys of the llama architecture that are read here, or that do not change what the model computes.
_KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout", "expert_count",
    "expert_used_count",
}  # fmt: skip
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# The parameters of every published Llama 3.1, 3.2 and 3.3; GGUF stores only the frequencies that result.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192
_FREQUENCY_TOLERANCE = 1e-4


def open_gguf(place: Place, name: str) -> Source:
    """Opens a GGUF file of the llama architecture.

    Raises: ConversionError or ConfigError naming the file, the key or tensor, and the reason.
    """
    path = place / name
    files = tuple(SourceFile(place, part) for part in part_names(name))
    headers = [read_gguf_header(file) for file in files]
    _check_parts(files, headers)
    file = files[0]
    # The first part has the metadata; tensors may be in any.
    header = GgufHeader(headers[0].metadata, {name: t for part in headers for name, t in part.tensors.items()})
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{path}: architecture {quote(architecture)} is not supported, expected 'llama'")
    config = _config(header, file)
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
            for name, tensor in _tensors(part_header, part, config).items()
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


def _config(header: GgufHeader, file: SourceFile) -> dict[str, Any]:
    read = _Reader(header.metadata, file.path)
    num_heads = read.integer("attention.head_count")
    num_kv_heads = read.integer("attention.head_count_kv", num_heads)
    hidden_size = read.integer("embedding_length")
    head_dim = read.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.integer(key, head_dim) != head_dim:
            raise ConfigError(
                f"{file.path}: llama.{key} is {read.integer(key)}, only head_dim ({head_dim}) is supported"
            )
    if read.integer("expert_count", 0):
        raise ConfigError(f"{file.path}: mixture-of-experts models are not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConversionError(f"{file.path}: missing token_embd.weight")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "rope_theta": _shortest_float32(read.number("rope.freq_base", 10_000.0)),
        "rope_scaling": None,
        **_special_ids(header.metadata, embedding.shape[0], file.path),
    }
    config["rope_scaling"] = _rope_scaling(read, header, file, config)
    read.refuse_unknown()
    return config


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
    kind = read.get("rope.scaling.type", "none")
    # `rope.scale_linear` is the older name of the linear factor.
    factor = read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"{file.path}: rope scaling {quote(kind)} is not supported; supported: none, linear, llama3 (by rope_freqs)"
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
    if kind == "none" and "llama.rope.scaling.type" in header.metadata:
        return None
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


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


def _tensors(header: GgufHeader, file: SourceFile, config: Mapping[str, Any]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for tensor in header.tensors.values():
        if tensor.name == _ROPE_FREQS:
            continue
        heads = None
        if match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            # A wrong number of rows is reported with every other misfit by match_tensors.
            heads = heads if tensor.shape[0] == heads * config["head_dim"] else None
        name = _hf_name(tensor.name)
        tensors[name] = SourceTensor(name, file, tensor.offset, tensor.num_bytes, tensor.shape, tensor.dtype, heads)
    return tensors


def _hf_name(name: str) -> str:
    """The Hugging Face name; an unknown name is kept, to be reported as unexpected."""
    if match := re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", name):
        if match[2] in _BLOCK:
            return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"
    elif (match := re.fullmatch(r"(\w+)\.(weight|bias)", name)) and match[1] in _TOP:
        return f"{_TOP[match[1]]}.{match[2]}"
    return name


def _shortest_float32(value: float) -> float:
    """The decimal a person wrote: GGUF's float32 1e-5 is 9.999999747378752e-06 as a double."""
    return float(str(np.float32(value)))


class _Reader:
    """Typed access to the `llama.*` metadata."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self._where = where

    def get(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(f"llama.{key}", default)
        if value is None:
            raise ConfigError(f"{self._where}: metadata llama.{key} is missing")
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise ConfigError(f"{self._where}: llama.{key} differs between layers, which is not supported")
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 <= value < 2**31 or (value == 0 and default != 0):
            raise ConfigError(f"{self._where}: llama.{key} must be a positive integer, got {quote(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{self._where}: llama.{key} must be a positive number, got {quote(value)}")
        return float(value)

    def refuse_unknown(self) -> None:
        """Raises ConfigError for keys that might change what the model computes and are not understood."""
        keys = [key for key in self._metadata if key.startswith("llama.") and key[6:] not in _KNOWN_KEYS]
        if keys:
            raise ConfigError(
                f"{self._where}: metadata is not understood: {listed([one_line(key) for key in sorted(keys)])}"
            )
