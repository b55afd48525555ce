"""How much of a decode step the host takes: the CPU time of the engine's thread, by part, and of `generate`'s.

    python bench/host_profile.py CHECKPOINT [--rows 32] [--new-tokens 64] [--logprobs 20]

The device works on threads of its own while the engine's thread waits, so a thread's CPU time is what Python and the
launch of programs cost.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import jaxllama
from jaxllama.engine.calls import Decode, SetPageTable
from jaxllama.engine.compilation import enable_compilation_cache

CALLS = {Decode: "launch the program", SetPageTable: "send the page table"}


class Watch:
    """The dispatches of an engine that were read: when, the thread's CPU time until then, and the number of steps."""

    def __init__(self, engine: Any) -> None:
        self.reads: list[tuple[float, float, int]] = []
        self.cpu_s: Counter[str] = Counter()
        read = engine._read

        def reading(dispatch: Any) -> None:
            read(dispatch)
            self.reads.append((time.perf_counter(), time.thread_time(), int(dispatch.output.num_steps)))

        engine._read = reading
        self._time(engine._dispatches, "_make_room", lambda _: "take pages")
        self._time(engine, "_deliver", lambda *_: "deliver the tokens")
        self._time(engine._programs, "run", lambda call: CALLS.get(type(call), "other calls"))

    def _time(self, owner: Any, name: str, part_of: Callable[..., str]) -> None:
        method = getattr(owner, name)

        def timed(*args: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args)
            finally:
                self.cpu_s[part_of(*args)] += time.thread_time() - start

        setattr(owner, name, timed)

    def per_step(self) -> tuple[float, float]:
        """Medians of wall and CPU seconds a step, between one read and the next, without the start and the end."""
        inner = self.reads[4:-4]
        pairs = [(before, after) for before, after in itertools.pairwise(inner) if after[2]]
        wall = statistics.median((after[0] - before[0]) / after[2] for before, after in pairs)
        return wall, statistics.median((after[1] - before[1]) / after[2] for before, after in pairs)


def main() -> None:
    args = parse_args()
    enable_compilation_cache()
    options = jaxllama.EngineOptions(max_rows=args.rows, max_context=1024)
    with jaxllama.load(args.checkpoint, options=options) as llama:
        llama.engine.warm_up()
        rng = np.random.default_rng(0)
        prompts = rng.integers(100, llama.config.vocab_size, (args.rows, 32)).tolist()
        params = jaxllama.SamplingParams(max_tokens=args.new_tokens, ignore_eos=True, logprobs=args.logprobs)
        llama.generate(prompts, params, progress=False)
        watch = Watch(llama.engine)
        start = time.thread_time()
        llama.generate(prompts, params, progress=False)
        caller_s = time.thread_time() - start
    report(watch, caller_s, args.rows)


def report(watch: Watch, caller_s: float, num_rows: int) -> None:
    """Prints milliseconds and shares of a step."""
    num_steps = sum(steps for _, _, steps in watch.reads)
    wall, engine = watch.per_step()
    lines = {"engine's thread": engine}
    lines |= {f"  {part}": seconds / num_steps for part, seconds in watch.cpu_s.items()}
    lines["generate's thread"] = caller_s / num_steps
    lines["both"] = engine + caller_s / num_steps
    print(f"{num_rows} rows, {num_steps} steps of {wall * 1e3:.1f} ms (median)")
    for name, seconds in lines.items():
        print(f"{name:24} {seconds * 1e3:6.2f} ms CPU a step  {seconds / wall:6.1%}")
    print(f"{'a token':24} {lines['both'] * 1e6 / num_rows:6.1f} µs CPU")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--logprobs", type=int, help="of every token (default: none)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
