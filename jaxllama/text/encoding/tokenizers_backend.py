"""tokenizer.json through the tokenizers library."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxllama.errors import TokenizerError, listed, quote
from jaxllama.text.encoding.backend import guarded, named_token, read_json, special_token
from jaxllama.text.encoding.detokenize import ByteDecoder, IncrementalDecoder, WindowDecoder
from jaxllama.text.encoding.specials import SpecialToken, Splitter

# Exercises pre-tokenizer regexes when a tokenizer is loaded: letters, digits, runs, scripts, emoji.
_TRIAL_TEXT = (
    "Hello world's 12345 tests!\n\n\t  def f(x): return x**2  # über 你好 مرحبا 👩‍👩‍👧 " + "a" * 2000 + "!" + " " * 500
)
_PIECES_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def json_specials(spec: Mapping[str, Any], where: str) -> list[SpecialToken]:
    """The added tokens of tokenizer.json that text must not spell.

    Runs of white space that are added tokens without being special are text like any other.
    """
    entries = spec.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TokenizerError(f"{where}: added_tokens must be a list of objects.")
    tokens = [special_token(entry, entry.get("id"), where) for entry in entries]
    return [token for token in tokens if token.hidden_by_flag or not token.content.isspace()]


class TokenizersBackend:
    """tokenizer.json through the tokenizers library.

    Ordinary text goes through a twin of the tokenizer in which every special token has an unguessable name, so that no
    text can spell one, while ids, merges and everything else stay.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Raises: TokenizerError if the file is damaged, or the library reads other ids in it than it says."""
        self._where = str(path)
        spec = read_json(path)
        self.bos_token, self.eos_token, self.pad_token = (
            named_token(config, name) for name in ("bos_token", "eos_token", "pad_token")
        )
        self.specials: list[SpecialToken] = json_specials(spec, self._where)
        # A file that cuts or pads would do so to every prompt.
        spec["truncation"] = spec["padding"] = None
        raw = guarded(f"{path}: the tokenizers library cannot load it", tokenizers.Tokenizer.from_file, str(path))
        raw.no_truncation()
        raw.no_padding()
        self._check_ids(spec, raw)
        self._add_named_tokens(raw)
        self._twin = self._load(_renamed(spec, [token.content for token in self.specials]))
        self._spec = spec
        self._variants: dict[str, tokenizers.Tokenizer] = {}
        self.size = max(raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.size:
            raise TokenizerError(f"{path}: has an empty vocabulary.")
        self.automatic_ids = guarded(self._where, _automatic_ids, raw)
        guarded(f"{self._where}: a trial encoding failed", self._twin.encode, _TRIAL_TEXT)
        self._raw = raw
        self._decoder_kind = _decoder_kind(spec.get("decoder"))
        self._prepare_splitting(raw)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """See `Backend.encode`."""
        return self._encode(self._variant("continues") if continues else self._twin, text)

    def split(self, text: str) -> Iterator[SpecialToken | str]:
        """See `Backend.split`."""
        for piece in self._splitter.split(text):
            if isinstance(piece, SpecialToken) or not self._normalizes:
                yield piece
            else:
                yield from self._split_normalized(piece)

    def encode_stretch(self, text: str, *, continues: bool) -> list[int]:
        """See `Backend.encode_stretch`."""
        return (
            self._encode(self._variant("normalized"), text)
            if self._normalizes
            else self.encode(text, continues=continues)
        )

    def token_bytes(self, token_id: int) -> bytes:
        """See `Backend.token_bytes`."""
        content = self._raw.id_to_token(token_id) if token_id >= 0 else None
        if content is None:
            return b""
        if token_id in self._special_ids:
            return content.encode()
        if self._decoder_kind == "bytes":
            byte_of_char = _byte_of_char()
            data = [byte_of_char.get(char) for char in content]
            return content.encode() if None in data else bytes(data)  # type: ignore[arg-type]
        if self._decoder_kind == "pieces":
            return _piece_bytes(content)
        return guarded(self._where, self._raw.decode, [token_id], skip_special_tokens=False).encode()

    def decoder(self, hidden: frozenset[int], prompt_tail: Sequence[int]) -> IncrementalDecoder:
        """See `Backend.decoder`."""
        if self._decoder_kind == "window":
            return WindowDecoder(lambda ids: self._decode_visible(ids, hidden), prompt_tail=prompt_tail)
        pieces = self._decoder_kind == "pieces"
        return ByteDecoder(
            lambda token_id: b"" if token_id in hidden else self._cached_bytes(token_id),
            replace_each_byte=pieces,
            strips_space=lambda _: pieces,
            prompt_tail=prompt_tail,
        )

    def _decode_visible(self, ids: list[int], hidden: frozenset[int]) -> str:
        visible = [token_id for token_id in ids if token_id not in hidden and 0 <= token_id < 2**32]
        return guarded(self._where, self._raw.decode, visible, skip_special_tokens=False)

    def _cached_bytes(self, token_id: int) -> bytes:
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self.token_bytes(token_id)
        return data

    def _load(self, spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
        what = f"{self._where}: the tokenizers library cannot load it"
        return guarded(what, lambda: tokenizers.Tokenizer.from_str(json.dumps(spec)))

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        return guarded(f"{self._where}: encoding failed", tokenizer.encode, text, add_special_tokens=False).ids

    def _check_ids(self, spec: Mapping[str, Any], raw: tokenizers.Tokenizer) -> None:
        problems = []
        names: dict[int, str] = {}
        for content, token_id in _vocabulary(spec):
            other = names.setdefault(token_id, content)
            if other != content:
                problems.append(f"id {token_id} belongs to both {quote(other)} and {quote(content)}")
        contents: set[str] = set()
        for entry in spec.get("added_tokens") or []:
            content, token_id = entry["content"], entry["id"]
            if content in contents:
                problems.append(f"the added token {quote(content)} is listed twice")
            contents.add(content)
            other = names.setdefault(token_id, content)
            if other != content:
                problems.append(f"id {token_id} belongs to both {quote(other)} and {quote(content)}")
            elif raw.token_to_id(content) != token_id:
                problems.append(f"{quote(content)} has id {token_id}, but the library reads {raw.token_to_id(content)}")
        if problems:
            raise TokenizerError(f"{self._where}: " + listed(problems))

    def _add_named_tokens(self, raw: tokenizers.Tokenizer) -> None:
        known = {token.content for token in self.specials}
        for name in (self.bos_token, self.eos_token):
            token_id = raw.token_to_id(name) if name is not None and name not in known else None
            if name is not None and token_id is not None:
                self.specials.append(SpecialToken(token_id, name))
                known.add(name)

    def _prepare_splitting(self, raw: tokenizers.Tokenizer) -> None:
        self._special_ids = {token.id for token in self.specials}
        self._bytes: dict[int, bytes] = {}
        self._normalizer = raw.normalizer
        normalized = [token for token in self.specials if token.normalized]
        # The library looks for tokens flagged "normalized" after normalising the text between the others.
        self._normalizes = bool(normalized) and self._normalizer is not None
        first = [token for token in self.specials if not token.normalized] if self._normalizes else self.specials
        self._splitter = Splitter(first)
        self._plain_splitter = Splitter(normalized)
        self._normalized_splitter = Splitter([_with_content(t, self._normalize(t.content)) for t in normalized])

    def _normalize(self, text: str) -> str:
        if self._normalizer is None:
            return text
        return str(guarded(f"{self._where}: normalising failed", self._normalizer.normalize_str, text))

    def _split_normalized(self, text: str) -> Iterator[SpecialToken | str]:
        plain = list(self._plain_splitter.split(text))
        # Without the template's tokens nothing may read as one: else message text turns into one when normalised.
        rest = "\ufffe".join(piece for piece in plain if isinstance(piece, str))
        if any(isinstance(piece, SpecialToken) for piece in self._normalized_splitter.split(self._normalize(rest))):
            yield from (piece if isinstance(piece, SpecialToken) else self._normalize(piece) for piece in plain)
        else:
            yield from self._normalized_splitter.split(self._normalize(text))

    def _variant(self, kind: str) -> tokenizers.Tokenizer:
        """The twin for text after other text ("continues"), or for text that is normalised already ("normalized")."""
        if kind not in self._variants:
            spec = dict(self._spec)
            if kind == "normalized":
                spec["normalizer"] = None
            changed = kind == "normalized" or _stop_prepending(spec)
            contents = [token.content for token in self.specials]
            self._variants[kind] = self._load(_renamed(spec, contents)) if changed else self._twin
        return self._variants[kind]


def _vocabulary(spec: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocab = spec.get("model", {}).get("vocab", {})
    if isinstance(vocab, dict):
        yield from vocab.items()
    else:
        yield from ((entry[0], token_id) for token_id, entry in enumerate(vocab))


def _renamed(spec: Mapping[str, Any], contents: Sequence[str]) -> dict[str, Any]:
    """`spec` with the tokens `contents` under names that no text can spell; ids stay."""
    secret = secrets.token_hex(16)
    names = {content: f"\ufffe{secret}:{i}" for i, content in enumerate(contents)}
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(content, content): token_id for content, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(entry[0], entry[0]), *entry[1:]] for entry in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges") and not names.keys().isdisjoint(content for content, _ in _vocabulary(spec)):
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if a not in names and b not in names and a + b not in names]
    added = [
        {**entry, "content": names.get(entry["content"], entry["content"])} for entry in spec.get("added_tokens") or []
    ]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}


def _stop_prepending(spec: dict[str, Any]) -> bool:
    """Makes a Metaspace that prepends its mark to the first text only do so never; whether there was one."""

    def changed(step: Any) -> Any:
        if not isinstance(step, dict):
            return step
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            return {**step, "prepend_scheme": "never"}
        if step.get("type") == "Sequence" and isinstance(step.get("pretokenizers"), list):
            return {**step, "pretokenizers": [changed(inner) for inner in step["pretokenizers"]]}
        return step

    before = spec.get("pre_tokenizer")
    spec["pre_tokenizer"] = changed(before)
    return bool(spec["pre_tokenizer"] != before)


def _automatic_ids(raw: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    plain, full = raw.encode("a", add_special_tokens=False).ids, raw.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    raise ValueError("its post-processor changes the tokens of the text")


def _with_content(token: SpecialToken, content: str) -> SpecialToken:
    return dataclasses.replace(token, content=content)


def _decoder_kind(decoder: Any) -> str:
    """How to decode: "bytes" (byte-level BPE), "pieces" (as SentencePiece), or "window", by the library."""
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    if kind == "ByteLevel":
        return "bytes"
    if kind == "Sequence" and decoder.get("decoders") == _PIECES_DECODERS:
        return "pieces"
    return "window"


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece-like token: `<0xE4>` is one byte, `▁` a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes.fromhex(piece[3:5])
        except ValueError:
            pass
    return piece.replace("▁", " ").encode()


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte for each character of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 on.

    Source: GPT-2, `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
