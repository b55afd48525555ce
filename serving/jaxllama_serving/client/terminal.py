"""How an answer is shown on a terminal while it comes: reasoning dimmed, content as Markdown."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

_FENCES = ("```", "~~~")


class AnswerView:
    """Shows one answer. What is complete is printed for good; only the last block is drawn again as it grows.

    With `fold`, reasoning becomes one line when the answer begins. Not on a terminal, text is printed as it comes.
    """

    def __init__(self, console: Console, *, fold: bool) -> None:
        self._console = console
        self._fold = fold
        self._started = time.monotonic()
        self._first: float | None = None
        self._reasoning: list[str] = []
        self._pending = ""
        self._num_chunks = 0
        self._is_thinking = False
        self._live = Live(console=console, refresh_per_second=12, vertical_overflow="visible", transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._console.is_terminal:
            self._console.print()
            return
        self._live.update(Text(""))
        self._live.stop()
        if self._is_thinking:
            self._close_reasoning()
        if self._pending.strip():
            self._console.print(Markdown(self._pending))

    def add(self, reasoning: str, content: str) -> None:
        """Shows more of the answer."""
        if reasoning or content:
            self._first = self._first or time.monotonic()
            self._num_chunks += 1
        if not self._console.is_terminal:
            self._console.out(content, end="", highlight=False)
            return
        if reasoning:
            self._reasoning.append(reasoning)
            self._is_thinking = True
        if content:
            if self._is_thinking and content.strip():
                self._close_reasoning()
            self._pending += content
            stable, self._pending = split_blocks(self._pending)
            if stable.strip():
                self._live.console.print(Markdown(stable))
        self._draw()

    def summary(self, num_tokens: int | None) -> str:
        """Tokens, tokens a second and the time to the first, in a few words."""
        now, first = time.monotonic(), self._first or time.monotonic()
        count = self._num_chunks if num_tokens is None else num_tokens
        rate = (count - 1) / (now - first) if count > 1 and now > first else 0.0
        return f"{count} tokens, {rate:.1f} a second, first after {first - self._started:.2f} s"

    def _close_reasoning(self) -> None:
        self._is_thinking = False
        text = "".join(self._reasoning).strip()
        if self._fold:
            seconds = time.monotonic() - self._started
            self._live.console.print(
                Text(f"thought for {seconds:.1f} s, {len(text.split())} words (/think shows it)", "dim")
            )
        else:
            self._live.console.print(Text(text, "dim italic"))

    def _draw(self) -> None:
        # What does not fit the screen cannot be drawn again.
        height = max(3, self._console.height - 3)
        shown: RenderableType
        if self._is_thinking:
            lines = "".join(self._reasoning).strip().splitlines()
            shown = Text("\n".join(lines[-height:]), "dim italic")
        elif self._pending.strip():
            lines = self._pending.splitlines()
            shown = Group(Markdown(self._pending)) if len(lines) < height else Text("\n".join(lines[-height:]))
        else:
            shown = Text("…" if self._first is None else "", "dim")
        self._live.update(shown)


def split_blocks(text: str) -> tuple[str, str]:
    """The Markdown blocks of `text` that later text cannot change, and the rest: cut at the last blank line that is
    outside a fence and not between items of a list."""
    cut, at, fence = 0, 0, ""
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines):
        stripped = line.strip()
        marker = next((mark for mark in _FENCES if stripped.startswith(mark)), "")
        if fence:
            fence = "" if marker == fence and stripped == marker else fence
        elif marker:
            fence = marker
        at += len(line)
        following = lines[index + 1] if index + 1 < len(lines) else ""
        may_join = following[:1].isspace() or following[:1].isdigit() or following[:1] in ("-", "*", "+")
        if not fence and not stripped and following.strip() and not may_join:
            cut = at
    return text[:cut], text[cut:]
