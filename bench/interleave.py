"""What a long prompt costs those who stream: gaps between a running stream's outputs while another prompt is prefilled.

    python bench/interleave.py CHECKPOINT [--prompt-tokens 6000] [--rows 16]

Prints the median and the longest gap without and with the long prompt, and what one largest chunk (and a step) takes
alone at the start and at the end of the prompt. The mark is 3 medians and one chunk.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

import numpy as np

import jaxllama
from jaxllama.engine.compilation import enable_compilation_cache


def main() -> None:
    args = parse_args()
    enable_compilation_cache()
    options = jaxllama.EngineOptions(max_rows=args.rows, max_context=args.prompt_tokens + 64)
    with jaxllama.load(args.checkpoint, options=options) as llama:
        llama.engine.warm_up()
        chunk = max(llama.engine.chunk_sizes)
        rng = np.random.default_rng(0)
        long_prompt = rng.integers(100, llama.config.vocab_size, args.prompt_tokens).tolist()
        first = time_to_first(llama, long_prompt[: chunk + 1])
        before = (args.prompt_tokens - 1 - chunk) // llama.engine.page_size * llama.engine.page_size
        time_to_first(llama, long_prompt[: before + 1], scope="the last chunk follows")
        last = time_to_first(llama, long_prompt[: before + chunk + 1], scope="the last chunk follows")
        stream = Stream(llama, rng.integers(100, llama.config.vocab_size, 64).tolist(), args.prompt_tokens - 64)
        stream.wait_for(40)
        start = stream.num_outputs
        time_to_first(llama, long_prompt)
        end = stream.num_outputs
        stream.request.cancel()
    quiet, busy = stream.gaps(5, start), stream.gaps(start, end)
    median = statistics.median(quiet)
    print(f"a chunk of {chunk} tokens alone: {1e3 * first:.0f} ms at the start, {1e3 * last:.0f} ms at the end")
    print(f"gaps without: median {1e3 * median:.0f} ms, longest {1e3 * max(quiet):.0f} ms ({len(quiet)})")
    print(f"gaps with a prompt of {args.prompt_tokens}: longest {1e3 * max(busy):.0f} ms ({len(busy)})")
    print(f"mark: 3 medians and one chunk, {1e3 * (3 * median + max(first, last)):.0f} ms")


class Stream:
    """A running request, and when its outputs came."""

    def __init__(self, llama: jaxllama.Llama, prompt: list[int], max_tokens: int) -> None:
        self._times: list[float] = []
        self._changed = threading.Condition()
        params = jaxllama.SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
        self.request = llama.engine.submit(prompt, params, self._take)

    def _take(self, _: jaxllama.TokenOutput) -> None:
        with self._changed:
            self._times.append(time.perf_counter())
            self._changed.notify_all()

    @property
    def num_outputs(self) -> int:
        return len(self._times)

    def wait_for(self, num_outputs: int) -> None:
        """Waits until so many outputs have come."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._times) >= num_outputs)

    def gaps(self, start: int, end: int) -> list[float]:
        """Seconds between outputs `start … end`."""
        return np.diff(self._times[start - 1 : end + 1]).tolist()


def time_to_first(llama: jaxllama.Llama, prompt: list[int], scope: str | None = None) -> float:
    """Seconds to the first token of a prompt of which the cache holds what was asked in the same `scope` before."""
    scope = str(time.perf_counter()) if scope is None else scope
    done = threading.Event()
    params = jaxllama.SamplingParams(temperature=0, ignore_eos=True, max_tokens=1)
    start = time.perf_counter()
    llama.engine.submit(prompt, params, lambda _: done.set(), cache_scope=scope)
    done.wait()
    return time.perf_counter() - start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
