"""What the routes share: the model once it is loaded, and whether requests are taken."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING, Any

from aiohttp import web

from jaxllama.system.profile import Profiler
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.metrics import Metrics
from jaxllama_serving.protocol.errors import unavailable
from jaxllama_serving.requests.running import RunningRequests

if TYPE_CHECKING:
    from jaxllama import Llama

FAILURE_POLL_S = 0.5
SCORERS = 32
"""Prompts that are scored at a time."""


class Service:
    """The state of one server: loading, then ready, then draining. Used on the event loop's thread only."""

    def __init__(self, llama: Llama | None, config: ServerConfig) -> None:
        self.config = config
        self.draining = False
        self._fingerprint: tuple[int, str] | None = None
        self.started_at = int(time.time())
        self.metrics = Metrics(self._gauges)
        self.requests = RunningRequests(config.max_pending_tokens, self.metrics)
        # Not among the workers: these wait for the engine, which scores as many at a time as it has rows.
        self.scorer = ThreadPoolExecutor(SCORERS, thread_name_prefix="jaxllama-score")
        self.profiler = Profiler(config.profile_dir) if config.profile_dir is not None else None
        self._llama: Llama | None = None
        self._peak_bytes_per_s: float | None = None
        # Two: tokenising releases the GIL, and a long prompt must not hold up every short one.
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="jaxllama-prepare")
        if llama is not None:
            self.set_llama(llama)

    def set_llama(self, llama: Llama) -> None:
        """Makes the server ready."""
        self._llama = llama
        traffic = llama.memory_traffic()
        given = self.config.peak_bandwidth
        self._peak_bytes_per_s = given * 1e9 if given is not None else traffic.bytes_per_s

        def on_steps(report: Any) -> None:
            self.metrics.count_steps(report.num_rows, report.seconds, traffic.read_bytes(report))
            self.metrics.count_drafts(report.num_steps * report.num_rows, report.num_drafted, report.num_accepted)

        llama.engine.on_steps = on_steps

    @property
    def fingerprint(self) -> str | None:
        """The model's as it is now, None while it loads."""
        if self._llama is None:
            return None
        # Of thousands of files, so not at every answer.
        if self._fingerprint is None or self._fingerprint[0] != params_version(self._llama):
            self._fingerprint = (params_version(self._llama), fingerprint(self._llama))
        return self._fingerprint[1]

    @property
    def max_context(self) -> int | None:
        """The longest prompt and completion together, in tokens; None while the model loads."""
        return self._llama.max_context if self._llama is not None else None

    @property
    def kernel_fault(self) -> str | None:
        """What a kernel does wrong on these devices, None if nothing."""
        return None if self._llama is None else self._llama.engine.stats().kernel_fault

    def _gauges(self) -> dict[str, float]:
        values: dict[str, float] = {"jaxllama_ready": self.not_ready_reason() is None}
        if self._llama is None:
            return values
        stats, rate = self._llama.engine.stats(), self.metrics.read_rate()
        values |= {
            "jaxllama_requests_waiting": stats.num_waiting,
            "jaxllama_requests_running": stats.num_running,
            "jaxllama_kv_pages_used": stats.num_pages_used,
            "jaxllama_kv_pages": stats.num_pages,
            "jaxllama_kv_pages_cached": stats.num_cached_pages,
            "jaxllama_compilations": stats.num_compilations,
            "jaxllama_device_hangs": stats.device_hangs,
            "jaxllama_kernel_fault": stats.kernel_fault is not None,
        }
        if stats.num_prompt_tokens:
            values["jaxllama_cache_hit_ratio"] = stats.num_prompt_tokens_cached / stats.num_prompt_tokens
        if self._peak_bytes_per_s is not None and rate is not None:
            values["jaxllama_decode_roofline_ratio"] = rate / self._peak_bytes_per_s
        return values

    async def device_hang(self) -> str:
        """Waits until a device hangs, has every request end with an error, and returns what is known of it."""
        while self._llama is None or not self._llama.engine.stats().device_hangs:
            await asyncio.sleep(FAILURE_POLL_S)
        reason = self.unhealthy_reason() or "A device hangs."
        # A thread of its own: the group's other processes are told, which may take a while.
        await asyncio.to_thread(self._llama.engine.give_up, reason)
        return reason

    async def engine_failure(self) -> str:
        """Waits until the engine has failed for good and returns the reason."""
        while self._llama is None or not self._llama.engine.stats().has_failed:
            await asyncio.sleep(FAILURE_POLL_S)
        return self.unhealthy_reason() or "The engine has failed."

    def not_ready_reason(self) -> str | None:
        """Returns why a request would be refused now, or None."""
        if self.draining:
            return "The server is shutting down."
        if self._llama is None:
            return "The model is still loading."
        return self.unhealthy_reason()

    def unhealthy_reason(self) -> str | None:
        """Returns why the process should be replaced, or None; a model that still loads is healthy."""
        reason = self._llama.engine.health() if self._llama is not None else None
        return f"The engine is not healthy: {reason}" if reason is not None else None

    def ready_llama(self) -> Llama:
        """Returns the model. Raises: ApiError, status 503, when requests are not taken."""
        reason = self.not_ready_reason()
        if reason is not None or self._llama is None:
            raise unavailable(reason or "The model is still loading.")
        return self._llama

    async def in_worker[T](self, function: Callable[..., T], *args: Any) -> T:
        """Runs `function` off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and waits for the running ones; returns how many had to be ended at the deadline."""
        self.draining = True
        return await self.requests.drain(timeout_s)

    async def close(self, app: web.Application) -> None:
        """Lets go of the worker threads; aiohttp calls it at cleanup."""
        if self.profiler is not None:
            self.profiler.stop()
        for pool in (self._workers, self.scorer):
            pool.shutdown(wait=False, cancel_futures=True)


SERVICE = web.AppKey("service", Service)


def fingerprint(llama: Llama) -> str:
    """Returns a short name for what decides the bits of an answer: this build, the checkpoint and the devices."""
    parts = [version(), repr(llama.checkpoint and llama.checkpoint.manifest), repr(getattr(llama, "mesh", None))]
    parts += [f"params {params_version(llama)}"] if params_version(llama) else []
    return "fp_" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def params_version(llama: Llama) -> int:
    """Returns how often the weights were changed since they were loaded."""
    return getattr(llama, "params_version", 0)


def version() -> str:
    """Returns the installed package's version."""
    try:
        return metadata.version("jaxllama")
    except metadata.PackageNotFoundError:
        return "source"
