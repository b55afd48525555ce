"""Sends requests to a server, by a number of clients or at a rate, and notes when each token comes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import aiohttp

from jaxllama_serving.client.api import ClientError, Endpoint
from jaxllama_serving.client.workload import Task


@dataclass(frozen=True)
class Load:
    """How requests are sent.

    `rate` None: `max_clients` requests run at any time. Else requests begin at random moments, `rate` a second in the
    mean (a Poisson process), whether earlier ones have ended or not, but at most `max_clients` at a time (None: any).
    """

    num_requests: int
    max_clients: int | None
    rate: float | None = None
    timeout_s: float = 600.0
    ignore_eos: bool = False
    seed: int = 0


@dataclass
class Outcome:
    """One request as the client saw it. Times are `time.perf_counter()`'s, of `token_times` one a chunk of text.

    `num_output_tokens` is the server's count, or else the number of chunks; `error` is set if it failed.
    """

    started: float
    ended: float = 0.0
    token_times: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return (self.token_times[0] if self.token_times else self.ended) - self.started

    @property
    def latency_s(self) -> float:
        """Time to the end."""
        return self.ended - self.started

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of one token."""
        if self.num_output_tokens < 2 or not self.token_times:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """The times between chunks."""
        return [late - early for early, late in zip(self.token_times, self.token_times[1:], strict=False)]


type OnOutcome = Callable[[Outcome], None]


async def run_load(
    endpoint: Endpoint, model: str, tasks: Iterator[Task], load: Load, on_outcome: OnOutcome
) -> list[Outcome]:
    """Sends `load.num_requests` of `tasks`. Cancelled, it ends what runs and raises CancelledError; `on_outcome` has
    then been told of all that ended."""
    outcomes: list[Outcome] = []
    room = asyncio.Semaphore(load.max_clients or load.num_requests)
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    rng = random.Random(load.seed)

    async def one(session: aiohttp.ClientSession, task: Task) -> None:
        try:
            outcome = await _request(endpoint, session, model, task, load)
        finally:
            room.release()
        outcomes.append(outcome)
        on_outcome(outcome)

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
        due = time.perf_counter()
        for _ in range(load.num_requests):
            if load.rate is not None:
                due += rng.expovariate(load.rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await room.acquire()
            group.create_task(one(session, next(tasks)))
    return outcomes


async def _request(endpoint: Endpoint, session: aiohttp.ClientSession, model: str, task: Task, load: Load) -> Outcome:
    body = {
        "model": model,
        "messages": list(task.messages),
        "max_tokens": task.max_tokens,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if load.ignore_eos else {}),
    }
    outcome = Outcome(started=time.perf_counter())
    pieces: list[str] = []
    try:
        async for chunk in endpoint.chat(session, body):
            for choice in chunk.get("choices") or []:
                delta = choice.get("delta") or {}
                text = (delta.get("reasoning_content") or delta.get("reasoning") or "") + (delta.get("content") or "")
                if text or delta.get("tool_calls"):
                    outcome.token_times.append(time.perf_counter())
                    pieces.append(text)
            usage = chunk.get("usage")
            if usage:
                outcome.num_prompt_tokens = usage.get("prompt_tokens") or 0
                outcome.num_output_tokens = usage.get("completion_tokens") or 0
    except ClientError as error:
        outcome.error = str(error)
    outcome.ended = time.perf_counter()
    outcome.text = "".join(pieces)
    outcome.num_output_tokens = outcome.num_output_tokens or len(outcome.token_times)
    return outcome
