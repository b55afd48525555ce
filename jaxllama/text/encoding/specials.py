"""Spellings of special tokens: where they occur in text, and how a rendered chat keeps users from writing them.

A chat template writes special tokens as text. So that a message cannot do the same, the first character of every
spelling inside a message is replaced by a stand-in (a noncharacter or private-use character that occurs nowhere else in
the chat) before the template runs. What still reads as a special token afterwards was written by the template; the
stand-ins become the users' characters again in the ordinary text between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

from jaxllama.errors import ChatTemplateError

# Rust's regex `\s`, which the tokenizers library uses: Unicode White_Space, without Python's U+001C to U+001F.
_RUST_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEADING_SPACE = re.compile(f"[{_RUST_SPACE}]*")
_TRAILING_SPACE = re.compile(f"[{_RUST_SPACE}]*\\Z")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class SpecialToken:
    """One added token. `hidden_by_flag` is the file's own "special"; the others are those of the tokenizers library."""

    id: int
    content: str
    hidden_by_flag: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def is_hidden(self) -> bool:
        """Whether the token is left out of decoded text.

        R1's `<｜User｜>` and `<｜Assistant｜>` are not flagged special, yet are marks between turns and not text, as
        are all spellings between bars. `<think>` or `<tool_call>`, not flagged either, stay visible: parsers need them.
        """
        return self.hidden_by_flag or re.fullmatch(r"<[|｜].*[|｜]>", self.content, re.DOTALL) is not None


class Splitter:
    """Cuts text at the spellings of special tokens, as the tokenizers library does.

    The leftmost spelling wins, of several there the longest. `lstrip` and `rstrip` tokens take the white space beside
    them; `single_word` tokens count only between non-word characters.

    Source: tokenizers, `AddedVocabulary::find_matches`.
    """

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def split(self, text: str) -> Iterator[SpecialToken | str]:
        """The tokens and the non-empty stretches of text between them, in order."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token = self._tokens[match.group()]
            start, end = match.span()
            if token.single_word and _touches_word(text, start, end):
                continue
            if token.lstrip:
                start = max(_trailing_space_start(text, done, start), done)
            if token.rstrip:
                space = _LEADING_SPACE.match(text, end)
                assert space is not None
                end = space.end()
            if done < start:
                yield text[done:start]
            yield token
            done = end
        if done < len(text):
            yield text[done:]


def _touches_word(text: str, start: int, end: int) -> bool:
    return bool((start > 0 and _WORD.match(text[start - 1])) or (end < len(text) and _WORD.match(text[end])))


def _trailing_space_start(text: str, low: int, high: int) -> int:
    while high > low and _LEADING_SPACE.match(text[high - 1]).end():  # type: ignore[union-attr]
        high -= 1
    return high


class Spellings:
    """The spellings that message text must not reach the template with."""

    def __init__(self, spellings: Iterable[str]) -> None:
        self.all = frozenset(spelling for spelling in spellings if spelling)
        self._starts = re.compile(f"(?={'|'.join(map(re.escape, sorted(self.all)))})") if self.all else None
        self._prefixes = {s[:n] for s in self.all for n in range(1, len(s))}
        self._suffixes = {s[n:] for s in self.all for n in range(1, len(s))}
        self._longest = max(map(len, self.all), default=0)

    def inner_starts(self, text: str) -> set[int]:
        """Where a spelling begins in `text`, overlapping ones included."""
        return {match.start() for match in self._starts.finditer(text)} if self._starts else set()

    def edge_starts(self, text: str) -> set[int]:
        """Where the end of `text` could begin, or its start could continue, a spelling together with its surroundings.

        A template may trim white space, so the edges are looked at with and without it.
        """
        starts: set[int] = set()
        for tail in {text, text.rstrip()}:
            for length in range(1, min(self._longest, len(tail) + 1)):
                if tail[-length:] in self._prefixes:
                    starts.add(len(tail) - length)
        for offset in {0, len(text) - len(text.lstrip())}:
            for length in range(1, min(self._longest, len(text) - offset + 1)):
                if text[offset : offset + length] in self._suffixes:
                    starts.add(offset)
        return starts


class StandIns:
    """The stand-in characters of one rendered chat."""

    def __init__(self, spellings: Spellings, texts: Sequence[str]) -> None:
        """`texts` is everything the chat can show: the messages and the template."""
        self.spellings = spellings
        self._texts = texts
        self._used: set[str] | None = None
        self._stand_ins: dict[str, str] = {}
        self._originals: dict[int, str] = {}

    def protect(self, text: str) -> str:
        """`text` unchanged if it holds nothing to hide, else with the first character of each spelling replaced."""
        starts = self.spellings.inner_starts(text) | self.spellings.edge_starts(text)
        return ProtectedText(self._replace(text, starts), self) if starts else text

    def protect_needle(self, text: str) -> str:
        """What `text`, of a template, looks like inside protected text."""
        return self._replace(text, self.spellings.inner_starts(text))

    def restore(self, text: str) -> str:
        """`text` with the users' own characters."""
        return text.translate(self._originals) if self._originals else text

    def _replace(self, text: str, starts: set[int]) -> str:
        if not starts:
            return text
        return "".join(self._stand_in(char) if i in starts else char for i, char in enumerate(text))

    def _stand_in(self, char: str) -> str:
        if char not in self._stand_ins:
            if self._used is None:
                self._used = set().union(*self._texts, *self.spellings.all)
            stand_in = next((c for c in _candidates() if c not in self._used), None)
            if stand_in is None:
                raise ChatTemplateError("The messages use every private-use character: no room to render them safely.")
            self._used.add(stand_in)
            self._stand_ins[char] = stand_in
            self._originals[ord(stand_in)] = char
        return self._stand_ins[char]


def _candidates() -> Iterator[str]:
    """Characters without meaning: the noncharacters of the BMP, then the private-use planes 15 and 16."""
    return map(chr, chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)))


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the template wrote it, for `Tokenizer.encode_rendered`.

    `text` is what a reader sees. `protected_text` is the same with stand-ins in the message texts, so that what reads
    as a special token there is the template's own. `starts_in_reasoning` is True if the text ends inside an open
    `<think>`, False if the model may open one itself, None if it does not reason: what `OutputAssembler` takes.
    `continued` is the text at the end that the output continues, if it does: the prompt's last message.
    """

    text: str
    protected_text: str
    protected_spellings: frozenset[str]
    stand_ins: StandIns
    starts_in_reasoning: bool | None
    continued: str = ""

    def restore(self, text: str) -> str:
        """A stretch of `protected_text` with the users' own characters."""
        return self.stand_ins.restore(text)


class ProtectedText(str):
    """Text of a message with stand-ins, for templates.

    A template that looks for a special spelling in a message (`'</think>' in content`, `content.split('</think>')`)
    still finds it: what it looks for is protected the same way.
    """

    _stand_ins: StandIns | None

    def __new__(cls, text: str = "", stand_ins: StandIns | None = None) -> Self:
        self = super().__new__(cls, text)
        self._stand_ins = stand_ins
        return self

    def _needle(self, needle: Any) -> Any:
        if self._stand_ins is None:
            return needle
        if isinstance(needle, tuple):
            return tuple(map(self._needle, needle))
        if isinstance(needle, str) and not isinstance(needle, ProtectedText):
            return self._stand_ins.protect_needle(needle)
        return needle

    def _wrap(self, text: str) -> ProtectedText:
        return ProtectedText(text, self._stand_ins)

    def __str__(self) -> str:
        return self  # Jinja's filters call `str`, which would make it forget what it is

    def __contains__(self, needle: object) -> bool:
        return super().__contains__(self._needle(needle))

    def __eq__(self, other: object) -> bool:
        return super().__eq__(self._needle(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __getitem__(self, index: Any) -> ProtectedText:
        return self._wrap(super().__getitem__(index))

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:
        return [self._wrap(part) for part in super().split(self._needle(sep), maxsplit)]

    def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[Any]:
        return [self._wrap(part) for part in super().rsplit(self._needle(sep), maxsplit)]

    def splitlines(self, keepends: Any = False) -> list[Any]:
        return [self._wrap(line) for line in super().splitlines(keepends)]

    def partition(self, sep: str) -> tuple[Any, Any, Any]:
        before, found, after = super().partition(self._needle(sep))
        return self._wrap(before), self._wrap(found), self._wrap(after)

    def rpartition(self, sep: str) -> tuple[Any, Any, Any]:
        before, found, after = super().rpartition(self._needle(sep))
        return self._wrap(before), self._wrap(found), self._wrap(after)

    def replace(self, old: str, new: str, count: Any = -1) -> ProtectedText:
        return self._wrap(super().replace(self._needle(old), new, count))

    def removeprefix(self, prefix: str) -> ProtectedText:
        return self._wrap(super().removeprefix(self._needle(prefix)))

    def removesuffix(self, suffix: str) -> ProtectedText:
        return self._wrap(super().removesuffix(self._needle(suffix)))

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return super().startswith(self._needle(prefix), *bounds)

    def endswith(self, suffix: Any, *bounds: Any) -> bool:
        return super().endswith(self._needle(suffix), *bounds)

    def find(self, needle: str, *bounds: Any) -> int:
        return super().find(self._needle(needle), *bounds)

    def rfind(self, needle: str, *bounds: Any) -> int:
        return super().rfind(self._needle(needle), *bounds)

    def index(self, needle: str, *bounds: Any) -> int:
        return super().index(self._needle(needle), *bounds)

    def count(self, needle: str, *bounds: Any) -> int:
        return super().count(self._needle(needle), *bounds)

    def strip(self, chars: Any = None) -> ProtectedText:
        return self._wrap(super().strip(chars))

    def lstrip(self, chars: Any = None) -> ProtectedText:
        return self._wrap(super().lstrip(chars))

    def rstrip(self, chars: Any = None) -> ProtectedText:
        return self._wrap(super().rstrip(chars))
