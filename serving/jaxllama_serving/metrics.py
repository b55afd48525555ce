"""What `/metrics` tells: what was asked, how fast it went, and the engine's load. Every label set is bounded."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from jaxllama_serving.requests.choices import Choices

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = {
    "jaxllama_ready": "1 when a request would be taken now.",
    "jaxllama_requests_waiting": "Choices that wait for a row.",
    "jaxllama_requests_running": "Choices that have a row.",
    "jaxllama_kv_pages_used": "Pages of the KV cache in use.",
    "jaxllama_kv_pages": "Pages of the KV cache.",
    "jaxllama_kv_pages_cached": "Pages of the KV cache that a later prompt can find, those in use included.",
    "jaxllama_cache_hit_ratio": "Of all prompts' tokens since the start, how many were found in the cache.",
    "jaxllama_compilations": "Programs compiled, or read from the cache on disk. Once ready it stays as it is.",
    "jaxllama_device_hangs": "1 while a device does not finish what it was given; /health says which.",
    "jaxllama_kernel_fault": "1 where a kernel disagrees with the reference on these devices, which runs in its place.",
    "jaxllama_decode_roofline_ratio": "Bytes that the last minute's decoding had to read (weights, live keys and "
    "values), over what the memory could deliver in its time. Absent where the bandwidth is unknown.",
}
"""Every gauge and what it means. They have no labels. All but the first appear once the model is loaded."""

ROOFLINE_WINDOW_S = 60.0
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The counters and histograms of one server. `read_gauges` gives the values of some of `GAUGES` now."""

    def __init__(self, read_gauges: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(read_gauges))
        self._requests = Counter(
            "jaxllama_requests",
            "Requests by route (unmatched: no such route), status (gone: none was sent) and outcome: finished, refused "
            "(4xx), failed (5xx, or an error in a stream), gone (the client left).",
            ("route", "status", "outcome"),
            registry=self._registry,
        )
        self._ignored_fields = Counter(
            "jaxllama_ignored_fields",
            "Fields of requests that are unknown here and were ignored, by route.",
            ("route",),
            registry=self._registry,
        )
        self._tokens = Counter(
            "jaxllama_tokens",
            "Tokens of prompts, of those what was found in the cache, and completions.",
            ("kind",),
            registry=self._registry,
        )
        for kind in ("prompt", "prompt_cached", "completion"):
            self._tokens.labels(kind)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's head to the first token of a choice.", _SECONDS
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Of a choice, between its first token and its last.", _TOKEN_SECONDS
        )
        self._queue_wait = self._histogram("queue_wait_seconds", "From submission to a row of the batch.", _SECONDS)
        self._batch_rows = self._histogram("batch_rows", "Rows that a dispatch decoded.", _ROWS)
        self._row_steps = Counter(
            "jaxllama_row_steps",
            "Steps of all rows that ran. Completion tokens over these are the tokens a step: above 1 with speculation.",
            registry=self._registry,
        )
        self._drafts = Counter(
            "jaxllama_speculation_tokens",
            "Tokens that were drafted and verified, and of those what was accepted.",
            ("kind",),
            registry=self._registry,
        )
        for kind in ("drafted", "accepted"):
            self._drafts.labels(kind)
        self._roofline: deque[tuple[float, float, float]] = deque()
        self._lock = threading.Lock()

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jaxllama_{name}", about, buckets=buckets, registry=self._registry)

    def text(self) -> bytes:
        """Returns all of it. Source: Prometheus, "Exposition formats", text format 0.0.4."""
        return generate_latest(self._registry)

    def count_request(self, route: str, status: int | None, *, failed: bool, num_ignored_fields: int = 0) -> None:
        """Counts a request at its end. `status` None: the client has gone; `failed`: its stream ended with an error."""
        if status is None:
            outcome = "gone"
        elif failed or status >= 500:
            outcome = "failed"
        else:
            outcome = "refused" if status >= 400 else "finished"
        self._requests.labels(route, "gone" if status is None else str(status), outcome).inc()
        if num_ignored_fields:
            self._ignored_fields.labels(route).inc(num_ignored_fields)

    def count_choices(self, num_prompt_tokens: int, choices: Choices, started: float) -> None:
        """Counts what a request of `started` (of `time.monotonic`) took from the engine, at its end."""
        self._tokens.labels("prompt").inc(num_prompt_tokens)
        self._tokens.labels("prompt_cached").inc(choices.num_cached_tokens)
        for choice in choices.all:
            self._tokens.labels("completion").inc(choice.num_tokens)
            if choice.row is not None and choice.row.queued_s is not None:
                self._queue_wait.observe(choice.row.queued_s)
            if choice.first_token_at is None or choice.last_token_at is None:
                continue
            self._first_token.observe(choice.first_token_at - started)
            if choice.num_tokens > 1:
                self._per_token.observe((choice.last_token_at - choice.first_token_at) / (choice.num_tokens - 1))

    def count_steps(self, num_rows: int, seconds: float, read_bytes: float) -> None:
        """Counts a dispatch, and what it had to read from one device's memory; on the engine's thread."""
        self._batch_rows.observe(num_rows)
        with self._lock:
            self._roofline.append((time.monotonic(), read_bytes, seconds))
            self._forget()

    def count_drafts(self, num_steps: int, num_drafted: int, num_accepted: int) -> None:
        """Counts the steps of a dispatch's rows, and the drafts in them; on the engine's thread."""
        self._row_steps.inc(num_steps)
        self._drafts.labels("drafted").inc(num_drafted)
        self._drafts.labels("accepted").inc(num_accepted)

    def read_rate(self) -> float | None:
        """Bytes a second that one device's memory had to deliver while decoding in the last minute; None if it did not.

        The time is that of the dispatches, with the prefills between their steps.
        """
        with self._lock:
            self._forget()
            seconds = sum(seconds for _, _, seconds in self._roofline)
            return sum(read for _, read, _ in self._roofline) / seconds if seconds > 0 else None

    def _forget(self) -> None:
        while self._roofline and self._roofline[0][0] < time.monotonic() - ROOFLINE_WINDOW_S:
            self._roofline.popleft()


class _Gauges(Collector):
    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, value in self._read().items():
            yield GaugeMetricFamily(name, GAUGES[name], value)
