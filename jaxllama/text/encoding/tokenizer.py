"""Text to ids and back, with either tokenizer library."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from jaxllama.errors import RequestError, TokenizerError, quote
from jaxllama.text.encoding.backend import Backend, named_token, read_json, tokenizer_config
from jaxllama.text.encoding.detokenize import IncrementalDecoder
from jaxllama.text.encoding.sentencepiece_backend import SentencePieceBackend
from jaxllama.text.encoding.specials import RenderedChat, SpecialToken
from jaxllama.text.encoding.tokenizers_backend import TokenizersBackend, json_specials


class Tokenizer:
    """A model's tokenizer.

    `special_tokens` are all added and control tokens, by spelling: ordinary text never becomes one of them. `specials`
    are the same with their flags. `named_tokens` are the spellings of `bos_token`, `eos_token` and `pad_token`, as far
    as there are such.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.vocab_size = backend.size
        self.specials = tuple(backend.specials)
        self.special_tokens: Mapping[str, int] = MappingProxyType({t.content: t.id for t in backend.specials})
        self.bos_token_id = self._named_id(backend.bos_token)
        self.eos_token_id = self._named_id(backend.eos_token)
        names = (("bos_token", backend.bos_token), ("eos_token", backend.eos_token), ("pad_token", backend.pad_token))
        self.named_tokens: Mapping[str, str] = MappingProxyType(
            {name: text for name, text in names if text is not None and text in self.special_tokens}
        )
        self._spellings = frozenset(self.special_tokens)
        self._hidden = frozenset(token.id for token in backend.specials if token.is_hidden)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """The ids of ordinary text. Text that spells a special token is encoded like any other.

        `add_bos=None` adds what the tokenizer's own files say, True the BOS token, False nothing.

        Raises: RequestError for a lone surrogate. TokenizerError if the library fails, or for `add_bos=True` without a
            BOS token.
        """
        ids = self._backend.encode(_checked(text))
        if add_bos is None:
            before, after = self._backend.automatic_ids
            return [*before, *ids, *after]
        if not add_bos:
            return ids
        if self.bos_token_id is None:
            raise TokenizerError("add_bos=True, but this tokenizer has no BOS token.")
        return [self.bos_token_id, *ids]

    def encode_rendered(self, rendered: RenderedChat) -> list[int]:
        """The ids of a rendered chat: the template's special tokens become their ids, users' text never does.

        Nothing is added: a template writes its BOS token itself.

        Raises: RequestError for a lone surrogate. TokenizerError if the library fails. ValueError if the chat was
            rendered for another tokenizer, so that it was not protected from this one's special tokens.
        """
        if not self._spellings <= rendered.protected_spellings:
            missing = sorted(self._spellings - rendered.protected_spellings)[:5]
            raise ValueError(
                f"the chat was rendered without knowing the special tokens {missing}: use its own template"
            )
        ids: list[int] = []
        for piece in self._backend.split(_checked(rendered.protected_text)):
            if isinstance(piece, SpecialToken):
                ids.append(piece.id)
            else:
                ids += self._backend.encode_stretch(rendered.restore(piece), continues=bool(ids))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; ids that the tokenizer does not know have none.

        `skip_special` leaves out the tokens flagged special and the marks between turns (`<|…|>`, `<｜…｜>`), whatever
        their flag. Bytes that are not UTF-8 become U+FFFD.
        """
        decoder = self.decoder(skip_special=skip_special)
        return decoder.push(ids) + decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, a leading space included; a special token's spelling; `b""` if unknown."""
        return self._backend.token_bytes(token_id)

    def decoder(
        self, *, skip_special: bool = True, prompt_tail: Sequence[int] = (), shown: Collection[str] = ()
    ) -> IncrementalDecoder:
        """A decoder for ids that come in pieces. All its text joined is `decode` of all ids.

        `shown` are special tokens that are not left out.

        After `prompt_tail`, the last ids of the prompt, the text continues the prompt's: SentencePiece's first space is
        kept, and a character that the prompt leaves unfinished is finished.
        """
        hidden = self._hidden - {self.special_tokens.get(text) for text in shown} if skip_special else frozenset()
        return self._backend.decoder(hidden, prompt_tail)

    def _named_id(self, name: str | None) -> int | None:
        if name is None:
            return None
        if name not in self.special_tokens:
            raise TokenizerError(
                f"tokenizer_config.json names the token {quote(name)}, which the tokenizer does not have."
            )
        return self.special_tokens[name]


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Reads tokenizer.json, or else tokenizer.model, with what tokenizer_config.json says, and tries it out.

    `vocab_size` is the model's. The tokenizer may know fewer ids, not more.

    Raises: TokenizerError if a file is missing or damaged, ids are doubled, renumbered or beyond the model's.
    """
    tokenizer = Tokenizer(load_backend(Path(folder)))
    if tokenizer.vocab_size > vocab_size:
        beyond = [f"{quote(token)} ({i})" for token, i in tokenizer.special_tokens.items() if i >= vocab_size]
        raise TokenizerError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model vocab_size={vocab_size}. "
            f"Special tokens beyond: {', '.join(beyond[:20]) or 'none'}. Are the files of one model?"
        )
    return tokenizer


def load_backend(folder: Path) -> Backend:
    """The library for the files in `folder`.

    Raises: TokenizerError.
    """
    config = tokenizer_config(folder)
    if (folder / "tokenizer.json").exists():
        return TokenizersBackend(folder / "tokenizer.json", config)
    if (folder / "tokenizer.model").exists():
        return SentencePieceBackend(folder / "tokenizer.model", config)
    raise TokenizerError(f"{folder}: holds neither tokenizer.json nor tokenizer.model.")


def special_spellings(folder: Path) -> frozenset[str]:
    """The spellings of all special tokens of the tokenizer in `folder`, without building it where that is slow.

    Raises: TokenizerError.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return frozenset(token.content for token in load_backend(folder).specials)
    config = tokenizer_config(folder)
    contents = {token.content for token in json_specials(read_json(path), str(path))}
    return frozenset(filter(None, [*contents, named_token(config, "bos_token"), named_token(config, "eos_token")]))


def _checked(text: str) -> str:
    """`text`, which the libraries take as UTF-8.

    Raises: RequestError.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        char = f"U+{ord(text[error.start]):04X}"
        raise RequestError(f"the text holds a lone surrogate, {char}, at character {error.start}.") from None
    return text
