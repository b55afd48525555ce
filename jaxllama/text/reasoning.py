"""Reasoning apart from content."""

from __future__ import annotations

from typing import Literal

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"
_NEWLINES = "\r\n"

type Kind = Literal["reasoning", "content"]
type Part = tuple[Kind, str]


def split_reasoning(content: str) -> tuple[str, str]:
    """The reasoning that a message begins with between its tags, else nothing, and the rest of the message.

    The newlines next to the tags belong to neither, as `ReasoningSplitter` has it.
    """
    start = content.lstrip()
    reasoning, found, rest = start.removeprefix(OPEN_TAG).partition(CLOSE_TAG)
    if not start.startswith(OPEN_TAG) or not found:
        return "", content
    return reasoning.strip(_NEWLINES), rest.lstrip(_NEWLINES)


class ReasoningSplitter:
    """Splits streamed text at `<think>` and `</think>`; the newlines next to the tags belong to neither side.

    With `starts_inside` the text begins as reasoning (the prompt has the opening tag; should the model repeat it, it is
    dropped). Otherwise only a tag that nothing but white space precedes opens the reasoning: later ones are content.
    After the closing tag all is content, so an answer may speak of the tags. Text that ends before `</think>` is
    reasoning to the end.

    Where the tags are single tokens, `tags_in_text=False` leaves the text alone and `open_tag` and `close_tag` tell of
    them. Pushes of any size give the same text. With `continues` the text goes on after text of the prompt's: its first
    newlines belong to it, and nothing opens.
    """

    def __init__(self, starts_inside: bool, *, tags_in_text: bool = True, continues: bool = False) -> None:
        self.is_inside = starts_inside
        self._tags_in_text = tags_in_text
        self._is_leading = not continues  # nothing but white space since the start or the last tag
        self._may_open = tags_in_text and not continues
        self._trims = starts_inside and not continues
        self._held = ""

    @property
    def is_undecided(self) -> bool:
        """Whether the text so far may still turn out to open the reasoning."""
        return self._may_open and not self.is_inside

    def push(self, text: str) -> list[Part]:
        """The parts that are certain, in order; none is empty."""
        self._held += text
        parts: list[Part] = []
        if self._may_open and not self._find_open(parts):
            return parts
        if self._tags_in_text and self.is_inside:
            before, found, after = self._held.partition(CLOSE_TAG)
            if found:
                self._held = before
                parts += self.close_tag()
                self._held = after
        self._emit(parts, self._num_open())
        return parts

    def flush(self) -> list[Part]:
        """The parts held back, at the end of the text."""
        self._may_open = False
        parts: list[Part] = []
        self._emit(parts, 0)
        return parts

    def open_tag(self) -> list[Part]:
        """Says that an opening tag comes here."""
        return self._tag(inside=True)

    def close_tag(self) -> list[Part]:
        """Says that a closing tag comes here."""
        return self._tag(inside=False)

    def _tag(self, *, inside: bool) -> list[Part]:
        self._held = self._held.rstrip(_NEWLINES)
        if self._is_leading and not self._held.strip():
            self._held = ""
        parts: list[Part] = []
        self._emit(parts, 0)
        self.is_inside = inside
        self._may_open = False
        self._is_leading = self._trims = True
        return parts

    def _find_open(self, parts: list[Part]) -> bool:
        """Looks for an opening tag at the start; false while that is undecided."""
        start = self._held.lstrip()
        if start.startswith(OPEN_TAG):
            self._held = ""
            parts += self.open_tag()
            self._held = start[len(OPEN_TAG) :]
            return True
        if OPEN_TAG.startswith(start):
            return False
        self._may_open = False
        return True

    def _num_open(self) -> int:
        """How many characters at the end may belong to a tag or to the newlines before one."""
        held = self._held
        if not self.is_inside and (self._tags_in_text or not self._is_leading):
            return 0
        end = len(held)
        if self._tags_in_text:
            lengths = range(len(CLOSE_TAG) - 1, 0, -1)
            end -= next((n for n in lengths if held.endswith(CLOSE_TAG[:n])), 0)
        if self._is_leading and not held[:end].strip():
            return len(held)
        return len(held) - len(held[:end].rstrip(_NEWLINES))

    def _emit(self, parts: list[Part], num_open: int) -> None:
        if self._trims:
            self._held = self._held.lstrip(_NEWLINES)
        cut = max(len(self._held) - num_open, 0)
        text, self._held = self._held[:cut], self._held[cut:]
        if text:
            self._trims = self._is_leading = False
            parts.append(("reasoning" if self.is_inside else "content", text))
