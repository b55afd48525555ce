"""What one request sends back, for tests of the engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from jaxllama import Engine, EngineRequest, SamplingParams, TokenLogprob, TokenOutput
from jaxllama.engine.calls import SavePages
from jaxllama.engine.device import Device

TIMEOUT_S = 60.0


class Collector:
    """Collects the outputs of one request, and checks that exactly one has a finish reason and that it is the last."""

    def __init__(self, engine: Engine, prompt: Sequence[int], params: SamplingParams, **rest: Any) -> None:
        self.outputs: list[TokenOutput] = []
        self.violations: list[str] = []
        self._first = threading.Event()
        self._ended = threading.Event()
        self.request: EngineRequest = engine.submit(prompt, params, self._take, **rest)

    def _take(self, output: TokenOutput) -> None:
        if self._ended.is_set():
            self.violations.append(f"an output after the last: {output}")
        if (output.error is not None) != (output.finish_reason == "error"):
            self.violations.append(f"error without its finish reason: {output}")
        self.outputs.append(output)
        self._first.set()
        if output.finish_reason is not None:
            self._ended.set()

    def wait(self, timeout_s: float = TIMEOUT_S) -> Collector:
        """Waits for the last output."""
        assert self._ended.wait(timeout_s), f"no end within {timeout_s} s; so far {self.outputs}"
        assert not self.violations
        return self

    def wait_for_first(self) -> Collector:
        """Waits for any output."""
        assert self._first.wait(TIMEOUT_S), "no output"
        return self

    @property
    def is_ended(self) -> bool:
        return self._ended.is_set()

    @property
    def tokens(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for output in self.outputs for entry in output.logprobs]

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[-1].finish_reason

    @property
    def error(self) -> Any:
        return self.outputs[-1].error


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Keeps the engine's thread inside a callback, so that what is submitted meanwhile waits."""
    is_held, release = threading.Event(), threading.Event()

    def hold(_: TokenOutput) -> None:
        is_held.set()
        assert release.wait(TIMEOUT_S)

    engine.submit([1], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), hold)
    assert is_held.wait(TIMEOUT_S)
    try:
        yield
    finally:
        release.set()


def run(engine: Engine, prompt: Sequence[int], params: SamplingParams, *, cache_scope: str | bytes = b"") -> Collector:
    """Submits a request and waits for its end."""
    return Collector(engine, prompt, params, cache_scope=cache_scope).wait()


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def assert_idle(engine: Engine) -> None:
    """Nothing runs, waits or holds pages, or will not in a moment: a cancelled row may take one more dispatch."""

    def load() -> tuple[int, int, int]:
        stats = engine.stats()
        return stats.num_running, stats.num_waiting, stats.num_pages_used

    assert wait_until(lambda: load() == (0, 0, 0)), load()


def watch_saved_pages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of pages of each request that is set aside from now on."""
    saved: list[int] = []
    make_call = Device.run

    def spy(self: Device, call: Any) -> Any:
        if isinstance(call, SavePages):
            saved.append(len(call.pages))
        return make_call(self, call)

    monkeypatch.setattr(Device, "run", spy)
    return saved
