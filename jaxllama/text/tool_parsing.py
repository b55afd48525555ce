"""Tool calls in streamed text.

`LooseParser` reads what a model writes of its own accord: a call shows once it is complete and of a tool that exists,
and everything else, malformed calls too, is content. `LiveParser` reads what a grammar has forced, so that arguments
can be passed on as they come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxllama.text.tools import GRANITE, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PHI, R1, ToolFormat

_MISTRAL_NAME = re.compile(r"[a-zA-Z0-9_-]*")
_R1_KIND, _R1_NAME = re.compile(r"[a-z]*"), re.compile(r"[^\s<`{｜]*")
_CALL_BEGIN = "<｜tool▁call▁begin｜>"


@dataclass(frozen=True)
class ToolDelta:
    """A piece of call `index`: its `name` at its beginning, else more text of its `arguments`."""

    index: int
    name: str | None = None
    arguments: str = ""


type Part = str | ToolDelta
"""A text is content."""


class ToolParser(Protocol):
    """Splits content into text and calls. Joined, the parts are the same however the text was cut.

    `marks` are special tokens that the text must show: they are hidden otherwise.
    """

    marks: tuple[str, ...]

    def push(self, text: str) -> list[Part]:
        """The parts that are certain."""

    def flush(self) -> list[Part]:
        """What was held back, at the end."""


class _Incomplete(Exception):  # noqa: N818
    """More text is needed to tell."""


class _Malformed(Exception):  # noqa: N818
    """This is no call."""


class LooseParser:
    """Calls of the tools `names` in text that nothing constrains.

    White space beside calls is dropped. A last call may lack what closes it, as R1's own template leaves it out.
    """

    def __init__(self, tool_format: ToolFormat, names: Sequence[str]) -> None:
        loose = _FORMATS[tool_format.name]
        self.marks = tool_format.marks
        self._read, self._openings, self._closer = loose.read, loose.openings, re.compile(loose.closer)
        self._is_bare = not self._openings
        # What the closer drops may come in pieces; a list's own end is read with it.
        self._after = tool_format.after.removeprefix("]")
        self._names = frozenset(names)
        self._held = ""
        self._extent = _Extent()
        self._num_calls = 0
        self._may_begin = self._is_bare  # whether a brace here would begin a call
        self._after_call = False

    def push(self, text: str) -> list[Part]:
        """The parts that are certain."""
        self._held += text
        return self._take(ended=False)

    def flush(self) -> list[Part]:
        """What was held back, at the end."""
        return self._take(ended=True)

    def _take(self, *, ended: bool) -> list[Part]:
        parts: list[Part] = []
        try:
            while self._held:
                self._skip_closer(ended)
                start = self._find_opening()
                if start is None:
                    self._emit(parts, len(self._held) if ended else self._num_certain())
                    break
                if not self._try_call(parts, start, ended):
                    # Not a call: its first character is text, and the search goes on behind it.
                    self._emit(parts, start + 1)
        except _Incomplete:
            pass
        return parts

    def _skip_closer(self, ended: bool) -> None:
        """Drops what closes or separates calls."""
        if not self._after_call:
            return
        match = self._closer.match(self._held)
        assert match is not None
        rest = self._held[match.end() :]
        if not ended and (not rest or self._after.startswith(rest)):
            raise _Incomplete
        self._held = rest
        self._after_call = False

    def _find_opening(self) -> int | None:
        if self._is_bare:
            start = len(self._held) - len(self._held.lstrip())
            return start if self._may_begin and self._held[start : start + 1] == "{" else None
        found = [at for opening in self._openings if (at := self._held.find(opening)) >= 0]
        return min(found, default=None)

    def _num_certain(self) -> int:
        """How many characters surely are text: not white space before a call, nor the beginning of an opening."""
        if self._is_bare:
            return 0 if self._may_begin and not self._held.strip() else len(self._held)
        end = len(self._held) - max(_num_begun(self._held, opening) for opening in self._openings)
        return len(self._held[:end].rstrip())

    def _try_call(self, parts: list[Part], start: int, ended: bool) -> bool:
        reader = _Reader(self._held, start, ended, self._extent)
        try:
            calls = self._read(reader)
            if not calls or not all(name in self._names and isinstance(arguments, dict) for name, arguments in calls):
                raise _Malformed
        except _Malformed:
            return False
        except _Incomplete:
            before = self._held[:start].rstrip()
            if before:
                self._emit(parts, len(before))
            raise
        before = self._held[:start].rstrip()
        if before:
            parts.append(before)
        for name, arguments in calls:
            parts.append(ToolDelta(self._num_calls, name))
            parts.append(ToolDelta(self._num_calls, None, json.dumps(arguments, ensure_ascii=False)))
            self._num_calls += 1
        self._held = self._held[reader.at :]
        self._extent.clear()
        self._after_call = True
        return True

    def _emit(self, parts: list[Part], end: int) -> None:
        text, self._held = self._held[:end], self._held[end:]
        if text:
            self._extent.clear()
            if text.strip():
                self._may_begin = False
            parts.append(text)


class LiveParser:
    """Calls in text that a grammar of `tools.calls_grammar` or `tools.auto_grammar` has produced.

    `must_call` says that there is nothing but calls. A call that is cut off shows as far as it came.
    """

    def __init__(self, tool_format: ToolFormat, names: Sequence[str], *, must_call: bool) -> None:
        f = tool_format
        self.marks = f.marks
        self._first = {f.before + f.head_of(name): name for name in names}
        self._next = {f.between + f.head_of(name): name for name in names}
        self._tail, self._end, self._opening = f.tail, f.after, f.opening
        self._state = "head" if must_call else "text"
        self._heads = self._first
        self._held = ""
        self._extent = _Extent()
        self._num_calls = 0

    def push(self, text: str) -> list[Part]:
        """The parts that are certain."""
        self._held += text
        parts: list[Part] = []
        try:
            while self._held:
                getattr(self, f"_in_{self._state}")(parts)
        except _Incomplete:
            pass
        return parts

    def flush(self) -> list[Part]:
        """What was held back, at the end: the beginning of a first call that was cut off is text."""
        held, self._held = self._held, ""
        is_text = self._state in ("text", "rest") or (self._state == "head" and not self._num_calls)
        return [held] if held and is_text else []

    def _in_text(self, parts: list[Part]) -> None:
        held, opening = self._held, self._opening
        if opening is None:
            # A message that begins with a brace is calls, any other is text.
            self._state = "head" if held.startswith("{") else "rest"
            return
        start = held.find(opening)
        end = start if start >= 0 else len(held) - _num_begun(held, opening)
        end = len(held[:end].rstrip())
        if end:
            parts.append(held[:end])
        self._held = held[end:]
        if start < 0:
            raise _Incomplete
        self._held, self._state = held[start:], "head"

    def _in_rest(self, parts: list[Part]) -> None:
        parts.append(self._held)
        self._held = ""

    def _in_head(self, parts: list[Part]) -> None:
        heads = self._next if self._num_calls else self._first
        for head, name in heads.items():
            if self._held.startswith(head):
                self._held, self._state = self._held[len(head) :], "arguments"
                self._extent.clear()
                parts.append(ToolDelta(self._num_calls, name))
                return
        if self._num_calls and self._end and self._held.startswith(self._end):
            self._held, self._state = self._held[len(self._end) :], "rest"
            return
        if any(text.startswith(self._held) for text in (*heads, self._end)):
            raise _Incomplete
        # Only a response format beside the tools allows something else than calls here.
        self._state = "rest"

    def _in_arguments(self, parts: list[Part]) -> None:
        end = self._extent.scan(self._held)
        text = self._held if end is None else self._held[:end]
        parts.append(ToolDelta(self._num_calls, None, text))
        self._held = self._held[len(text) :]
        if end is not None:
            self._num_calls += 1
            self._state = "tail"

    def _in_tail(self, parts: list[Part]) -> None:
        if self._held.startswith(self._tail):
            self._held, self._state = self._held[len(self._tail) :], "head"
        elif self._tail.startswith(self._held):
            raise _Incomplete
        else:
            self._state = "rest"


class _Extent:
    """Finds where a JSON object ends, given its text piece by piece."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins a new object."""
        self._num_scanned = self._depth = 0
        self._in_string = self._is_escaped = False

    def end_of(self, text: str) -> int | None:
        """The end of the object that `text` begins with; `text` has grown since the last call."""
        before = self._num_scanned
        end = self.scan(text[before:])
        return None if end is None else before + end

    def scan(self, more: str) -> int | None:
        """The end of the object in `more`, the text after what was scanned before; None if it goes on."""
        for i, char in enumerate(more):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._num_scanned += i
                    return i + 1
        self._num_scanned += len(more)
        return None


class _Reader:
    """A cursor on text that may go on."""

    def __init__(self, text: str, at: int, ended: bool, extent: _Extent) -> None:
        self.text, self.at, self.ended = text, at, ended
        self._extent = extent

    def space(self) -> None:
        """Skips white space."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def literal(self, *options: str) -> None:
        """Takes the first of `options` that is here.

        Raises: _Malformed, _Incomplete.
        """
        rest = self.text[self.at : self.at + max(map(len, options))]
        for option in options:
            if rest.startswith(option):
                self.at += len(option)
                return
            if not self.ended and option.startswith(rest):
                raise _Incomplete
        raise _Malformed

    def closing(self, *options: str) -> None:
        """Takes white space and one of `options`; at the end of the text also nothing or the beginning of one."""
        self.space()
        rest = self.text[self.at :]
        if self.ended and any(option.startswith(rest) for option in options):
            self.at = len(self.text)
            return
        self.literal(*options)

    def match(self, pattern: re.Pattern[str]) -> str:
        """Takes what matches, which must not be the last of the text."""
        found = pattern.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        if self.at == len(self.text) and not self.ended:
            raise _Incomplete
        return found.group()

    def object(self) -> dict[str, Any]:
        """Takes a JSON object."""
        return dict(self._json("{"))

    def list(self) -> list[Any]:
        """Takes a JSON list."""
        return list(self._json("["))

    def next_is(self, text: str) -> bool:
        """Whether `text` comes after white space.

        Raises: _Incomplete.
        """
        self.space()
        rest = self.text[self.at : self.at + len(text)]
        if rest != text and not self.ended and text.startswith(rest):
            raise _Incomplete
        return rest == text

    def _json(self, begin: str) -> Any:
        self.space()
        if self.at == len(self.text) and not self.ended:
            raise _Incomplete
        if self.text[self.at : self.at + 1] != begin:
            raise _Malformed
        length = self._extent.end_of(self.text[self.at :])
        if length is None and not self.ended:
            raise _Incomplete
        if length is None:
            raise _Malformed
        text = self.text[self.at : self.at + length]
        self.at += length
        try:
            return json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise _Malformed from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _num_begun(text: str, opening: str) -> int:
    """How many characters at the end of `text` begin `opening`."""
    lengths = range(min(len(opening) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(opening[:n])), 0)


type _Calls = list[tuple[Any, Any]]
"""Names and arguments, not yet checked."""


def _call_of(call: Any) -> tuple[Any, Any]:
    if not isinstance(call, dict):
        raise _Malformed
    return call.get("name"), call.get("arguments", call.get("parameters", {}))


def _read_hermes(reader: _Reader) -> _Calls:
    reader.literal("<tool_call>")
    call = reader.object()
    reader.closing("</tool_call>")
    return [(call.get("name"), call.get("arguments", {}))]


def _read_llama3(reader: _Reader) -> _Calls:
    call = reader.object()
    return [(call.get("name"), call.get("parameters", call.get("arguments", {})))]


def _read_r1(reader: _Reader) -> _Calls:
    if reader.text.startswith(R1.before, reader.at):
        reader.literal(R1.before)
        reader.space()
    reader.literal(_CALL_BEGIN)
    reader.match(_R1_KIND)
    reader.literal("<｜tool▁sep｜>")
    name = reader.match(_R1_NAME)
    reader.space()
    reader.literal("```json", "```", "{")
    if reader.text[reader.at - 1] == "{":
        reader.at -= 1
    arguments = reader.object()
    reader.space()
    if reader.text.startswith("`", reader.at) or reader.at == len(reader.text):
        reader.closing("```")
    reader.closing("<｜tool▁call▁end｜>")
    return [(name, arguments)]


def _read_mistral(reader: _Reader) -> _Calls:
    """Either of Mistral's forms, with ids or without: fine-tunes mix them."""
    reader.literal("[TOOL_CALLS]")
    if reader.next_is("["):
        return [_call_of(call) for call in reader.list()]
    name = reader.match(_MISTRAL_NAME)
    if reader.next_is("[CALL_ID]"):
        reader.literal("[CALL_ID]")
        reader.match(_MISTRAL_NAME)
    reader.literal("[ARGS]")
    return [(name, reader.object())]


def _read_granite(reader: _Reader) -> _Calls:
    reader.literal("<|tool_call|>", "<tool_call>")
    return [_call_of(call) for call in reader.list()]


def _read_phi(reader: _Reader) -> _Calls:
    reader.literal("<|tool_call|>", "functools")
    if reader.next_is("["):
        return [_call_of(call) for call in reader.list()]
    return [_call_of(reader.object())]


@dataclass(frozen=True)
class _Loose:
    """How calls are read, what may begin some, and what is dropped after them."""

    read: Callable[[_Reader], _Calls]
    openings: tuple[str, ...]
    closer: str = r"\s*"


_FORMATS = {
    HERMES.name: _Loose(_read_hermes, ("<tool_call>",)),
    LLAMA3.name: _Loose(_read_llama3, (), r"[\s;,]*"),
    R1.name: _Loose(_read_r1, (R1.before, _CALL_BEGIN), rf"\s*(?:{R1.after})?\s*"),
    MISTRAL.name: _Loose(_read_mistral, ("[TOOL_CALLS]",)),
    MISTRAL_ARGS.name: _Loose(_read_mistral, ("[TOOL_CALLS]",)),
    GRANITE.name: _Loose(_read_granite, ("<|tool_call|>", "<tool_call>")),
    PHI.name: _Loose(_read_phi, ("<|tool_call|>", "functools"), r"\s*(?:<\|/tool_call\|>)?\s*"),
}
