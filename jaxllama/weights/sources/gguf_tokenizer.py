"""Makes tokenizer files of a GGUF file's metadata.

Byte-level BPE (`gpt2`) becomes a tokenizer.json; SentencePiece (`llama`) becomes a tokenizer.model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllama.errors import ConversionError, quote
from jaxllama.text.encoding.protobuf import field

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Words of capitals and small letters apart, as o200k and Tekken have them.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _letters_and(digits: str) -> str:
    """Contractions, words, numbers of so many digits, and the rest, as cl100k has them."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_and(digits: str, contractions: str = "") -> str:
    word = r"[^\r\n\p{L}\p{N}]?"
    cased = rf"{word}{_UPPER}*{_LOWER}+{contractions}|{word}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{cased}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclass(frozen=True)
class _PreTokenizer:
    """What splits text before the merges: `regex`, or GPT-2's own, with `digits` each digit by itself first.

    `ignore_merges`: a word that is a token is taken as it is, whatever the merges say. `adds_bos`: llama.cpp adds BOS
    unless the metadata says otherwise. `normalizer` is the original tokenizer's; llama.cpp has none.
    """

    regex: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False
    normalizer: str | None = None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """As tokenizer.json has them."""
        first: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        if self.regex is not None:
            first = [{"type": "Split", "pattern": {"Regex": self.regex}, "behavior": "Isolated", "invert": False}]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return [*first, byte_level | {"use_regex": self.regex is None}]


# By `tokenizer.ggml.pre`. Source: the tokenizer.json of these models, which llama.cpp's `llama-vocab.cpp` quotes.
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "smollm": _PreTokenizer(digits=True),
    "llama-bpe": _PreTokenizer(_letters_and(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
    "qwen2": _PreTokenizer(_letters_and(r"\p{N}"), normalizer="NFC"),
    "deepseek-r1-qwen": _PreTokenizer(_letters_and(r"\p{N}")),
    # OLMo 2 and Phi-4, and SmolLM3: cl100k's and Llama 3's splits, merges by the rules.
    "dbrx": _PreTokenizer(_letters_and(r"\p{N}{1,3}")),
    "smaug-bpe": _PreTokenizer(_letters_and(r"\p{N}{1,3}")),
    # Mistral Nemo and later.
    "tekken": _PreTokenizer(_cased_and(r"\p{N}"), ignore_merges=True, adds_bos=True),
    # Phi-4-mini.
    "gpt-4o": _PreTokenizer(_cased_and(r"\p{N}{1,3}", rf"{_CONTRACTIONS}?")),
    # Granite 3 has StarCoder's vocabulary.
    "refact": _PreTokenizer(digits=True),
    "starcoder": _PreTokenizer(digits=True),
    "gpt-2": _PreTokenizer(),
    "olmo": _PreTokenizer(),
}
_PRE_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "phi-2": "gpt-2", "llama4": "gpt-4o"}


def tokenizer_files(metadata: Mapping[str, Any], vocab_size: int, where: str) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer files and chat template, and warnings. No files if the GGUF has no tokenizer.

    Raises: ConversionError for a tokenizer that is damaged or cannot be reproduced.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return {}, [f"{where}: has no tokenizer; the checkpoint will take token ids only"]
    vocabulary = _Vocabulary(metadata, vocab_size, where)
    if model == "gpt2":
        pre = _PRE_ALIASES.get(metadata.get("tokenizer.ggml.pre", ""), metadata.get("tokenizer.ggml.pre"))
        if pre not in _PRE_TOKENIZERS:
            raise ConversionError(
                f"{where}: pre-tokenizer {quote(pre)} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}. "
                "Convert from the safetensors of this model instead"
            )
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", _PRE_TOKENIZERS[pre].adds_bos)
        files = {"tokenizer.json": _byte_level_json(vocabulary, _PRE_TOKENIZERS[pre], add_bos)}
    elif model == "llama":
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
        files = {"tokenizer.model": _sentencepiece_model(vocabulary)}
    else:
        raise ConversionError(f"{where}: tokenizer model {quote(model)} is not supported; supported: gpt2, llama")
    template = metadata.get("tokenizer.chat_template")
    files["tokenizer_config.json"] = _tokenizer_config(vocabulary, model, bool(add_bos))
    if template is not None:
        if not isinstance(template, str):
            raise ConversionError(f"{where}: tokenizer.chat_template must be text")
        files["chat_template.jinja"] = template.encode("utf-8")
    return files, []


class _Vocabulary:
    """The checked token lists of the metadata."""

    def __init__(self, metadata: Mapping[str, Any], vocab_size: int, where: str) -> None:
        self.metadata = metadata
        self.where = where
        self.tokens: list[str] = self._strings("tokens")
        self.types: list[int] = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(self.tokens)
        if not all(type(kind) is int and _NORMAL <= kind <= _BYTE for kind in self.types):
            raise ConversionError(f"{where}: tokenizer.ggml.token_type must be numbers from {_NORMAL} to {_BYTE}")
        if len(self.types) != len(self.tokens):
            raise ConversionError(f"{where}: {len(self.types)} token types for {len(self.tokens)} tokens")
        if len(self.tokens) > vocab_size:
            raise ConversionError(f"{where}: {len(self.tokens)} tokens, but the embedding has {vocab_size} rows")
        if len(set(self.tokens)) != len(self.tokens):
            seen: set[str] = set()
            twice = next(token for token in self.tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
            raise ConversionError(f"{where}: token {quote(twice)} appears twice in the vocabulary")

    def special(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise ConversionError(
                f"{self.where}: {name}_token_id {quote(value)} is not in the vocabulary of {len(self.tokens)}"
            )
        return value

    def merges(self) -> list[list[str]]:
        known = set(self.tokens)
        merges = [merge.split(" ") for merge in self._strings("merges")]
        for merge in merges:
            if len(merge) != 2 or not {*merge, "".join(merge)} <= known:
                raise ConversionError(f"{self.where}: merge {quote(' '.join(merge))} is not of two known tokens")
        return merges

    def scores(self) -> list[float]:
        scores = self.metadata.get("tokenizer.ggml.scores")
        if (
            not isinstance(scores, list)
            or len(scores) != len(self.tokens)
            or not all(isinstance(score, float) for score in scores)
        ):
            raise ConversionError(
                f"{self.where}: tokenizer.ggml.scores must have a number for each of {len(self.tokens)} tokens"
            )
        return scores

    def _strings(self, name: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise ConversionError(f"{self.where}: tokenizer.ggml.{name} must be a list of texts")
        return value


def _byte_level_json(vocabulary: _Vocabulary, pre: _PreTokenizer, add_bos: bool) -> bytes:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": kind in (_CONTROL, _UNKNOWN)}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
    bos = vocabulary.special("bos")
    processors = [byte_level]
    if add_bos and bos is not None:
        processors.append(_prepend(vocabulary.tokens[bos], bos))
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None if pre.normalizer is None else {"type": pre.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
        "post_processor": {"type": "Sequence", "processors": processors},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {token: i for i, token in enumerate(vocabulary.tokens)},
            "merges": vocabulary.merges(),
        },
    }
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def _prepend(token: str, token_id: int) -> dict[str, Any]:
    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _tokenizer_config(vocabulary: _Vocabulary, model: str, add_bos: bool) -> bytes:
    value: dict[str, Any] = {
        "add_bos_token": add_bos,
        "add_eos_token": bool(vocabulary.metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        # The generic class: the named ones change the pre-tokenizer behind our back.
        "tokenizer_class": "PreTrainedTokenizerFast" if model == "gpt2" else "LlamaTokenizer",
    }
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token_id = vocabulary.special(name)
        value[key] = None if token_id is None else vocabulary.tokens[token_id]
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _sentencepiece_model(vocabulary: _Vocabulary) -> bytes:
    """A serialised SentencePiece ModelProto (BPE with byte fallback) of the vocabulary.

    Source: sentencepiece_model.proto of google/sentencepiece; the token types of GGUF are its piece types.
    """
    pieces = zip(vocabulary.tokens, vocabulary.scores(), vocabulary.types, strict=True)
    body = b"".join(
        field(1, field(1, token.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + field(3, kind))
        for token, score, kind in pieces
    )
    has_bytes = _BYTE in vocabulary.types
    bpe = 2
    trainer = field(3, bpe) + field(4, len(vocabulary.tokens)) + field(35, int(has_bytes))
    for number, name, default in ((40, "unknown", 0), (41, "bos", -1), (42, "eos", -1), (43, "padding", -1)):
        token_id = vocabulary.special(name)
        trainer += field(number, default if token_id is None else token_id)
    add_prefix = vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True)
    collapse = vocabulary.metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    normalizer = field(1, b"identity") + field(3, int(bool(add_prefix))) + field(4, int(bool(collapse))) + field(5, 1)
    return body + field(2, trainer) + field(3, normalizer)
