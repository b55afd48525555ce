"""tokenizer.model through the sentencepiece library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from jaxllama.errors import TokenizerError, listed, quote
from jaxllama.text.encoding.backend import guarded, named_token, read_json, special_token
from jaxllama.text.encoding.detokenize import ByteDecoder, IncrementalDecoder
from jaxllama.text.encoding.protobuf import fields
from jaxllama.text.encoding.specials import SpecialToken, Splitter

_CONTROL, _USER_DEFINED = 3, 4  # sentencepiece_model.proto, SentencePiece.Type


class SentencePieceBackend:
    """tokenizer.model, with the added tokens of tokenizer_config.json and added_tokens.json."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Raises: TokenizerError if the file is damaged or the added tokens contradict it."""
        self._where = str(path)
        model = _without_user_defined_marks(guarded(f"{path}: cannot be read", path.read_bytes), self._where)
        load = sentencepiece.SentencePieceProcessor
        self._sp = guarded(f"{path}: the sentencepiece library cannot load it", load, model_proto=model)
        num_pieces = guarded(self._where, self._sp.get_piece_size)
        if not num_pieces:
            raise TokenizerError(f"{path}: holds no pieces.")
        self._pieces = [self._sp.id_to_piece(i) for i in range(num_pieces)]
        self.specials: list[SpecialToken] = self._find_specials(_added_tokens(path.parent, config))
        self.size = max(num_pieces, *(token.id + 1 for token in self.specials), 0)
        self._splitter = Splitter(self.specials)
        self._bytes = {token.id: token.content.encode() for token in self.specials}
        self._raw_byte_ids = {i for i in range(num_pieces) if self._sp.is_byte(i)}
        self.bos_token = named_token(config, "bos_token") or self._piece_of(self._sp.bos_id())
        self.eos_token = named_token(config, "eos_token") or self._piece_of(self._sp.eos_id())
        before = self._ids(self.bos_token) if config.get("add_bos_token", True) else ()
        self.pad_token = named_token(config, "pad_token")
        self.automatic_ids = (before, self._ids(self.eos_token) if config.get("add_eos_token", False) else ())

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """See `Backend.encode`. Each stretch begins with the dummy prefix, as in Meta's own Llama-2 code."""
        return guarded(f"{self._where}: encoding failed", self._sp.encode, text)

    def split(self, text: str) -> Iterator[SpecialToken | str]:
        """See `Backend.split`."""
        return self._splitter.split(text)

    def encode_stretch(self, text: str, *, continues: bool) -> list[int]:
        """See `Backend.encode_stretch`."""
        return self.encode(text, continues=continues)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Backend.token_bytes`."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._piece_bytes(token_id) if 0 <= token_id < len(self._pieces) else b""
            self._bytes[token_id] = data
        return data

    def decoder(self, hidden: frozenset[int], prompt_tail: Sequence[int]) -> IncrementalDecoder:
        """See `Backend.decoder`."""
        return ByteDecoder(
            lambda token_id: b"" if token_id in hidden else self.token_bytes(token_id),
            replace_each_byte=True,
            strips_space=lambda i: i < len(self._pieces) and self._pieces[i].startswith("▁"),
            prompt_tail=prompt_tail,
        )

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        if token_id in self._raw_byte_ids:
            return bytes.fromhex(piece[3:5])
        if self._sp.is_unknown(token_id):
            return str(self._sp.decode([token_id])).encode()
        return piece.replace("▁", " ").encode()

    def _find_specials(self, added: Mapping[int, SpecialToken]) -> list[SpecialToken]:
        problems = []
        specials = dict(added)
        for token_id, piece in enumerate(self._pieces):
            if token_id in added and added[token_id].content != piece:
                content = quote(added[token_id].content)
                problems.append(f"id {token_id} is {quote(piece)} in the model, but the added token {content}")
            if token_id not in added and self._sp.is_control(token_id):
                specials[token_id] = SpecialToken(token_id, piece)
        ids: dict[str, int] = {}
        for token in specials.values():
            if ids.setdefault(token.content, token.id) != token.id:
                problems.append(f"{quote(token.content)} has the ids {ids[token.content]} and {token.id}")
        if problems:
            raise TokenizerError(f"{self._where}: " + listed(problems))
        return list(specials.values())

    def _piece_of(self, token_id: int) -> str | None:
        return self._pieces[token_id] if token_id >= 0 else None

    def _ids(self, content: str | None) -> tuple[int, ...]:
        return tuple(token.id for token in self.specials if token.content == content)


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, SpecialToken]:
    where = str(folder / "tokenizer_config.json")
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder must be an object.")
    tokens: dict[int, SpecialToken] = {}
    for key, entry in entries.items():
        if not (isinstance(key, str) and key.isdecimal() and isinstance(entry, dict)):
            raise TokenizerError(f"{where}: added_tokens_decoder must map ids to objects, got {quote(key)}.")
        tokens[int(key)] = special_token(entry, int(key), where)
    path = folder / "added_tokens.json"
    if path.exists():
        for content, token_id in read_json(path).items():
            token = special_token({"content": content, "special": True}, token_id, str(path))
            if tokens.setdefault(token.id, token).content != content:
                raise TokenizerError(
                    f"{path}: id {token.id} is {quote(content)}, but {quote(tokens[token.id].content)} in {where}."
                )
    return {
        token_id: token for token_id, token in tokens.items() if token.hidden_by_flag or not token.content.isspace()
    }


def _without_user_defined_marks(model: bytes, where: str) -> bytes:
    """The model with user-defined pieces such as `<|im_end|>` or `[INST]` turned into control pieces.

    The library finds user-defined pieces in any text; control pieces in none. Those that are not in brackets, such as
    runs of spaces, are text and stay.
    """
    patched = bytearray(model)
    try:
        for field, start, end in fields(model, 0, len(model)):
            if field != 1:
                continue
            piece, type_at = b"", -1
            for inner, inner_start, inner_end in fields(model, start, end):
                if inner == 1:
                    piece = model[inner_start:inner_end]
                elif inner == 3:
                    type_at = inner_start
            in_brackets = (piece[:1] == b"<" and piece[-1:] == b">") or (piece[:1] == b"[" and piece[-1:] == b"]")
            if type_at >= 0 and model[type_at] == _USER_DEFINED and in_brackets and len(piece) > 2:
                patched[type_at] = _CONTROL
    except (IndexError, ValueError):
        raise TokenizerError(f"{where}: is not a SentencePiece model: its protobuf fields are damaged.") from None
    return bytes(patched)
