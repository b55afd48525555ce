"""Reasoning apart from content."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

_NEWLINES = "\r\n"

type Kind = Literal["reasoning", "content"]
type Part = tuple[Kind, str]


@dataclass(frozen=True)
class ReasoningTags:
    """What a model writes around its reasoning, and around the answer after it, if anything.

    `newline` is what it puts between a tag and the text next to it.
    """

    open: str
    close: str
    newline: str = "\n"
    answer: tuple[str, str] | None = None

    @property
    def closing(self) -> str:
        """What ends the reasoning, up to the answer."""
        return f"{self.newline}{self.close}{self.newline * 2}"


THINK = ReasoningTags("<think>", "</think>")
"""R1's, Qwen3's and others'."""
GRANITE = ReasoningTags("<think>", "</think>", answer=("<response>", "</response>"))
MAGISTRAL = ReasoningTags("[THINK]", "[/THINK]", newline="")


def choose_tags(template: str, spellings: Collection[str]) -> ReasoningTags | None:
    """Those that a chat template names, or else the tokenizer; None: the model does not reason."""
    if THINK.close in template:
        return GRANITE if GRANITE.answer is not None and GRANITE.answer[0] in template else THINK
    if MAGISTRAL.close in template:
        return MAGISTRAL
    return next((tags for tags in (THINK, MAGISTRAL) if tags.close in spellings), None)


def split_reasoning(content: str, tags: ReasoningTags = THINK) -> tuple[str, str]:
    """The reasoning that a message begins with between its tags, else nothing, and the rest of the message.

    The newlines next to the tags belong to neither, as `ReasoningSplitter` has it.
    """
    start = content.lstrip()
    reasoning, found, rest = start.removeprefix(tags.open).partition(tags.close)
    if not start.startswith(tags.open) or not found:
        return "", content
    if tags.answer is not None and rest.lstrip().startswith(tags.answer[0]):
        rest = rest.strip().removeprefix(tags.answer[0]).removesuffix(tags.answer[1]).rstrip(_NEWLINES)
    return reasoning.strip(_NEWLINES), rest.lstrip(_NEWLINES)


class ReasoningSplitter:
    """Splits streamed text at the `tags`, `<think>` and `</think>`; the newlines next to them belong to neither side.

    With `starts_inside` the text begins as reasoning (the prompt has the opening tag; should the model repeat it, it is
    dropped). Otherwise only a tag that nothing but white space precedes opens the reasoning: later ones are content.
    After the closing tag all is content, so an answer may speak of the tags. Text that ends before `</think>` is
    reasoning to the end. Tags around the whole answer, where a model writes such, are dropped.

    Where the tags are single tokens, `tags_in_text=False` leaves the text alone and `open_tag` and `close_tag` tell of
    them. Pushes of any size give the same text. With `continues` the text goes on after text of the prompt's: its first
    newlines belong to it, and nothing opens.
    """

    def __init__(
        self,
        starts_inside: bool,
        tags: ReasoningTags = THINK,
        *,
        tags_in_text: bool = True,
        continues: bool = False,
    ) -> None:
        self.is_inside = starts_inside
        self._tags = tags
        self._may_wrap = False  # the answer may begin with a tag of its own
        self._is_wrapped = False  # it did
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
            before, found, after = self._held.partition(self._tags.close)
            if found:
                self._held = before
                parts += self.close_tag()
                self._held = after
        if self._may_wrap and not self._find_answer():
            return parts
        self._emit(parts, self._num_open())
        return parts

    def flush(self) -> list[Part]:
        """The parts held back, at the end of the text."""
        self._may_open = self._may_wrap = False
        if self._is_wrapped and (end := self._held.rstrip()).endswith(self._answer_end):
            self._held = end.removesuffix(self._answer_end).rstrip(_NEWLINES)
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
        self._may_wrap = not inside and self._tags.answer is not None
        self._is_leading = self._trims = True
        return parts

    @property
    def _answer_end(self) -> str:
        assert self._tags.answer is not None
        return self._tags.answer[1]

    def _find_answer(self) -> bool:
        """Looks for the tag around the answer at its start; false while that is undecided."""
        assert self._tags.answer is not None
        start, tag = self._held.lstrip(), self._tags.answer[0]
        if tag.startswith(start) and start != tag:
            return False
        self._may_wrap = False
        if start.startswith(tag):
            self._is_wrapped = True
            self._held = start.removeprefix(tag)
        return True

    def _find_open(self, parts: list[Part]) -> bool:
        """Looks for an opening tag at the start; false while that is undecided."""
        start = self._held.lstrip()
        if start.startswith(self._tags.open):
            self._held = ""
            parts += self.open_tag()
            self._held = start.removeprefix(self._tags.open)
            return True
        if self._tags.open.startswith(start):
            return False
        self._may_open = False
        return True

    def _num_open(self) -> int:
        """How many characters at the end may belong to a tag or to the newlines before one."""
        held = self._held
        if not self.is_inside and self._is_wrapped:
            end = len(held.rstrip().removesuffix(self._answer_end))
            if end == len(held.rstrip()):
                end = len(held) - _num_begun(self._answer_end, held)
            return len(held) - len(held[:end].rstrip(_NEWLINES))
        if not self.is_inside and (self._tags_in_text or not self._is_leading):
            return 0
        end = len(held)
        if self._tags_in_text:
            end -= _num_begun(self._tags.close, held)
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


def _num_begun(tag: str, text: str) -> int:
    """How many characters at the text's end may be the first ones of `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
