"""How far a long job is: a bar on a terminal or in a notebook, a few lines elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

type OnBytes = Callable[[int, int, str], None]
"""Gets how many bytes are done, of how many, and the name of what is at work."""

_REDRAW_S = 0.2
_GB = 1e9


class Advance(Protocol):
    """Counts what has been done since the last call."""

    def __call__(self, *, items: int = 0, tokens: int = 0) -> None: ...


def is_watched() -> bool:
    """Whether a person sees what goes to stderr: it is a terminal, or this is a notebook."""
    return _watched_console() is not None


@contextmanager
def show_progress(name: str, total: int, *, show: bool | None = None, done: int = 0) -> Iterator[Advance]:
    """Shows how many of `total` items are done (`done` were before), and tokens a second.

    `show` None shows a bar on a terminal (stderr) and in a notebook, and nothing elsewhere; True shows a line every
    tenth of the items there; False shows nothing.
    """
    console = None if show is False else _watched_console()
    if console is None:
        yield _Lines(name, total, done) if show else _count_nothing
        return
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

    rate, bar = _Rate(), _make_bar(console, MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    bar.columns = (*bar.columns, TimeRemainingColumn())
    task = bar.add_task(name, total=total, completed=done, rate="")
    with _shown(bar, console) as redraw:

        def advance(*, items: int = 0, tokens: int = 0) -> None:
            bar.update(task, advance=items, rate=rate.after(tokens))
            redraw()

        yield advance


@contextmanager
def show_bytes(name: str, *, show: bool | None = None, after_s: float = 0.0) -> Iterator[OnBytes]:
    """As `show_progress`, of bytes, whose number is known at the first call.

    `show` None shows a line every tenth where there is no terminal, if there is more than a gigabyte. What is done
    within `after_s` shows no bar.
    """
    console = None if show is False else _watched_console()
    if console is None:
        yield (lambda done, total, at_work: None) if show is False else _ByteLines(name)
        return
    from rich.progress import DownloadColumn, TextColumn, TransferSpeedColumn

    bar = _make_bar(console, DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[at_work]}"))
    task = bar.add_task(name, total=None, at_work="checking")
    shows_from = time.monotonic() + after_s
    with ExitStack() as stack:
        redraw = None if after_s else stack.enter_context(_shown(bar, console))

        def on_bytes(done: int, total: int, at_work: str) -> None:
            nonlocal redraw
            bar.update(task, completed=done, total=total, at_work=at_work)
            if redraw is None and time.monotonic() >= shows_from:
                redraw = stack.enter_context(_shown(bar, console))
            if redraw is not None:
                redraw()

        yield on_bytes


def _watched_console() -> Console | None:
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal or console.is_jupyter else None


def _make_bar(console: Console, *columns: Any) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn(), console=console)


@contextmanager
def _shown(bar: Progress, console: Console) -> Iterator[Callable[[], None]]:
    """Shows the bar for the body. Yields what shows a change, where that does not happen by itself."""
    if not console.is_jupyter:
        with bar:
            yield lambda: None
        return
    # rich's own way needs ipywidgets.
    from IPython.display import display

    handle = display(bar.make_tasks_table(bar.tasks), display_id=True)
    drawn = time.monotonic()

    def redraw() -> None:
        nonlocal drawn
        if bar.finished or time.monotonic() - drawn >= _REDRAW_S:
            drawn = time.monotonic()
            handle.update(bar.make_tasks_table(bar.tasks))

    yield redraw


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


class _Tenths:
    """Says when another tenth is done."""

    def __init__(self, done: int = 0, total: int = 0) -> None:
        self._last = 10 * done // max(1, total)

    def is_next(self, done: int, total: int) -> bool:
        tenth = 10 * done // max(1, total)
        before, self._last = self._last, max(tenth, self._last)
        return tenth > before


class _Lines:
    """Prints a line every tenth of the items."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done = name, total, done
        self._rate, self._tenths = _Rate(), _Tenths(done, total)

    def __call__(self, *, items: int = 0, tokens: int = 0) -> None:
        rate = self._rate.after(tokens)
        self._done += items
        if self._tenths.is_next(self._done, self._total):
            print(f"{self._name}: {self._done} of {self._total}, {rate}", file=sys.stderr, flush=True)


class _ByteLines:
    """Prints a line every tenth of a gigabyte or more."""

    def __init__(self, name: str) -> None:
        self._name, self._tenths = name, _Tenths()

    def __call__(self, done: int, total: int, at_work: str) -> None:
        if total > _GB and self._tenths.is_next(done, total):
            print(f"{self._name}: {done / _GB:.1f} of {total / _GB:.1f} GB", file=sys.stderr, flush=True)
