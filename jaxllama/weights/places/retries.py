"""Reading on where a connection was lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from jaxllama.errors import StoreError

MAX_FAILURES = 7
FIRST_WAIT_S = 0.25
MAX_WAIT_S = 30.0
# A connection that gets this far counts as one that works.
_PROGRESS_BYTES = 2**20


class ReadInterruptedError(Exception):
    """A read that may be tried again. `num_read` bytes of it arrived; the store asks to wait `wait_s`."""

    def __init__(self, reason: str, num_read: int = 0, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.num_read = num_read
        self.wait_s = wait_s


def fill(where: str, buffer: memoryview, read_from: Callable[[int, memoryview], None]) -> None:
    """Fills `buffer`: `read_from(done, rest)` fills the rest of it, and is asked again for what it did not get.

    Waits between attempts twice as long each time, at least as long as the store says.

    Raises: StoreError after seven attempts that brought nothing, or what else `read_from` raises.
    """
    done = failures = progress = 0
    while True:
        try:
            read_from(done, buffer[done:])
            return
        except ReadInterruptedError as error:
            done += error.num_read
            progress += error.num_read
            if progress >= _PROGRESS_BYTES:
                failures = progress = 0
            failures += 1
            if failures >= MAX_FAILURES:
                raise StoreError(f"{where}: gave up after {failures} attempts ({error})") from None
            time.sleep(_wait_s(failures, error.wait_s))


def attempt[T](where: str, ask: Callable[[], T]) -> T:
    """The answer of `ask`, which is asked again while it raises ReadInterruptedError. Raises: StoreError, as `fill`."""
    answers: list[T] = []
    fill(where, memoryview(b""), lambda _done, _rest: answers.append(ask()))
    return answers[-1]


def _wait_s(failures: int, asked_s: float | None) -> float:
    # Readers that were refused together must not come back together.
    wait = FIRST_WAIT_S * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
    return min(MAX_WAIT_S, max(wait, asked_s or 0.0))
