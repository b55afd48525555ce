"""What `speed.py` measures of a server: streams over HTTP, the first token, memory, and the time until it is ready."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

STREAM_TOKENS = 64
QUESTION = "Tell me a long story about a lighthouse keeper and the sea."
type Measured = tuple[str, str, list[tuple[float, float]], str]
"""What it is, its unit, `(ours, beside it)` of each round, and what is asked."""

_ARRAYS = """
import sys, jax, jaxllama
with jaxllama.load(sys.argv[1]) as llama:
    llama.generate([5], jaxllama.SamplingParams(max_tokens=1))
    print(sum(array.nbytes for array in jax.live_arrays()))
"""


@contextmanager
def serving(
    checkpoint: Path, port: int, *options: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[int, float]]:
    """A server that is ready: its process id, and the seconds that it took."""
    command = [sys.executable, "-m", "jaxllama", "serve", str(checkpoint), "--port", str(port)]
    began = time.monotonic()
    server = subprocess.Popen(
        [*command, "--log-level", "warning", *options],
        stdout=subprocess.DEVNULL,
        env=os.environ | (environment or {}),
    )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        yield server.pid, time.monotonic() - began
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("the server has ended" if server.poll() is not None else "the server is not ready after 300 s")


def measure_serving(
    checkpoint: Path, streams: int, port: int, rounds: int, generate: Callable[[int, int, int], float]
) -> list[Measured]:
    """Streams beside `generate(steps, rows, prompt tokens)` of as many tokens, prefill included in both; and what an
    idle server takes to the first token beside `generate` of one: a chunk and a step."""
    speeds, firsts = [], []
    url, model = f"http://127.0.0.1:{port}", checkpoint.resolve().name
    tokens = streams * STREAM_TOKENS
    with serving(checkpoint, port, "--max-rows", str(streams), "--max-context", "1024"):
        num_prompt = asyncio.run(stream_all(url, model, streams, 2))
        generate(2, streams, num_prompt)
        for _ in range(rounds):
            began = time.perf_counter()
            asyncio.run(stream_all(url, model, streams, STREAM_TOKENS))
            served = tokens / (time.perf_counter() - began)
            speeds.append((served, tokens / generate(STREAM_TOKENS, streams, num_prompt)))
            for _ in range(3):
                firsts.append((1e3 * asyncio.run(first_token(url, model)), 1e3 * generate(1, 1, 23)))
    return [
        (f"{streams} streams over HTTP, beside generate", "tokens/s", speeds, ">= 0.95"),
        ("first token of an idle server, beside a chunk and a step", "ms", firsts, ""),
    ]


async def stream_all(url: str, model: str, streams: int, max_tokens: int) -> int:
    """The number of tokens of each one's prompt. No two prompts begin alike: a prefix would come from the cache."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}

    async def one(session: aiohttp.ClientSession, number: int) -> int:
        prompt = f"{time.time_ns() % 10**9:09}{number:02}. {QUESTION}"
        async with session.post(f"{url}/v1/completions", json=body | {"prompt": prompt}) as response:
            response.raise_for_status()
            events = (await response.text()).rstrip().split("\n\n")
        assert events[-1] == "data: [DONE]", events[-1]
        usage = json.loads(events[-2].removeprefix("data: "))["usage"]
        assert usage["completion_tokens"] == max_tokens, usage
        return int(usage["prompt_tokens"])

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        return max(await asyncio.gather(*[one(session, number) for number in range(streams)]))


async def first_token(url: str, model: str) -> float:
    """Seconds from a request on a new connection to the first event of its stream."""
    prompt = [100 + time.time_ns() // 10**i % 9973 for i in range(23)]
    body = {"model": model, "prompt": prompt, "stream": True, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    start = time.perf_counter()
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        line = await response.content.readline()
        assert line.startswith(b"data: {"), line
        return time.perf_counter() - start


def measure_memory(checkpoint: Path, port: int) -> tuple[float, float]:
    """Megabytes that `jaxllama serve` holds after warm-up, and those of its arrays: weights, cache, rows' state."""
    with serving(checkpoint, port) as (process_id, _):
        status = Path(f"/proc/{process_id}/status").read_text()
    resident = re.search(r"VmRSS:\s*(\d+) kB", status)
    assert resident is not None
    arrays = subprocess.run(
        [sys.executable, "-c", _ARRAYS, str(checkpoint)], check=True, capture_output=True, text=True
    )
    return int(resident[1]) * 1024 / 1e6, float(arrays.stdout.split()[-1]) / 1e6


def measure_start(checkpoint: Path, port: int, cache: Path) -> float:
    """Seconds to ready, with programs and kernels kept in `cache`."""
    # Modules keep their bytecode, as an installed package's do.
    without = {"JAX_COMPILATION_CACHE_DIR": "", "PYTHONDONTWRITEBYTECODE": ""}
    with serving(checkpoint, port, "--compilation-cache", str(cache), environment=without) as (_, seconds):
        return seconds
