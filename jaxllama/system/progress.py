"""How far a long job is: a bar on a terminal or in a notebook, a few lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_REDRAW_S = 0.2


class Advance(Protocol):
    """Counts what has been done since the last call."""

    def __call__(self, *, items: int = 0, tokens: int = 0) -> None: ...


def is_watched() -> bool:
    """Whether a person sees what goes to stderr: it is a terminal, or this is a notebook."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal or console.is_jupyter


@contextmanager
def show_progress(name: str, total: int, *, show: bool | None = None, done: int = 0) -> Iterator[Advance]:
    """Shows how many of `total` items are done (`done` were before), and tokens a second.

    `show` None shows a bar on a terminal (stderr) and in a notebook, and nothing elsewhere; True shows a line every
    tenth of the items there; False shows nothing.
    """
    if show is False:
        yield _count_nothing
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal and not console.is_jupyter:
        yield _Lines(name, total, done) if show else _count_nothing
        return
    rate, bar = _Rate(), _make_bar(console)
    task = bar.add_task(name, total=total, completed=done, rate="")
    redraw = _redraw_in_notebook(bar) if console.is_jupyter else None

    def advance(*, items: int = 0, tokens: int = 0) -> None:
        bar.update(task, advance=items, rate=rate.after(tokens))
        if redraw is not None:
            redraw(bar.finished)

    if redraw is not None:
        yield advance
        return
    with bar:
        yield advance


def _make_bar(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _redraw_in_notebook(bar: Progress) -> Callable[[bool], None]:
    """Shows the bar, and returns what shows it anew, at most every `_REDRAW_S`; rich's own way needs ipywidgets."""
    from IPython.display import display

    handle = display(bar.make_tasks_table(bar.tasks), display_id=True)
    drawn = time.monotonic()

    def redraw(is_last: bool) -> None:
        nonlocal drawn
        if is_last or time.monotonic() - drawn >= _REDRAW_S:
            drawn = time.monotonic()
            handle.update(bar.make_tasks_table(bar.tasks))

    return redraw


def _count_nothing(*, items: int = 0, tokens: int = 0) -> None:
    pass


class _Rate:
    """Tokens a second since it was made, as text."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._num_tokens = 0

    def after(self, num_tokens: int) -> str:
        self._num_tokens += num_tokens
        seconds = max(1e-3, time.monotonic() - self._started)
        return f"{self._num_tokens / seconds:,.0f} tokens/s"


class _Lines:
    """Prints a line every tenth of the items."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done = name, total, done
        self._rate = _Rate()

    def __call__(self, *, items: int = 0, tokens: int = 0) -> None:
        rate = self._rate.after(tokens)
        tenth = 10 * self._done // max(1, self._total)
        self._done += items
        if 10 * self._done // max(1, self._total) > tenth:
            print(f"{self._name}: {self._done} of {self._total}, {rate}", file=sys.stderr, flush=True)
