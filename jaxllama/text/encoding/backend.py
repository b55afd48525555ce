"""What the two tokenizer libraries have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxllama.errors import TokenizerError, one_line, quote
from jaxllama.system.strict_json import parse_object
from jaxllama.text.encoding.detokenize import IncrementalDecoder
from jaxllama.text.encoding.specials import SpecialToken


class Backend(Protocol):
    """What `Tokenizer` needs of a tokenizer library."""

    size: int
    specials: list[SpecialToken]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    automatic_ids: tuple[tuple[int, ...], tuple[int, ...]]
    """What the library puts before and after ordinary text by itself."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ordinary text to ids. `continues`: text or special tokens come before it in the same sequence."""

    def split(self, text: str) -> Iterator[SpecialToken | str]:
        """Cuts at special tokens. The text between may come out normalised."""

    def encode_stretch(self, text: str, *, continues: bool) -> list[int]:
        """Encodes a stretch of text that `split` returned."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; a special token's spelling; nothing for an unknown id."""

    def decoder(self, hidden: frozenset[int], prompt_tail: Sequence[int]) -> IncrementalDecoder:
        """A decoder that leaves out the `hidden` ids."""


def guarded[T](what: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls the tokenizer library. A Rust panic is no `Exception`, so everything but an interrupt is caught.

    Raises: TokenizerError.
    """
    try:
        return call(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {one_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises: TokenizerError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({one_line(error)})") from None
    return parse_object(data, path, TokenizerError)


def special_token(entry: Mapping[str, Any], token_id: Any, where: str) -> SpecialToken:
    """One entry of `added_tokens` or `added_tokens_decoder`.

    Raises: TokenizerError.
    """
    content = entry.get("content")
    if not isinstance(content, str) or not content or not isinstance(token_id, int) or isinstance(token_id, bool):
        raise TokenizerError(
            f"{where}: an added token needs a text and an integer id, got {quote(content)} and {quote(token_id)}."
        )
    flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return SpecialToken(token_id, content, bool(entry.get("special", False)), **flags)


def named_token(config: Mapping[str, Any], name: str) -> str | None:
    """The spelling of `bos_token` or another named token of tokenizer_config.json: a text, or an object with one."""
    value = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; named tokens that it lacks come from special_tokens_map.json. Either file may be absent.

    Raises: TokenizerError.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= read_json(folder / name)
    return config
