"""Positions a second of scoring, beside one prompt at a time in a cache of its own, which is how it was before.

    python bench/scoring.py [--checkpoint PATH] [--dtype float32] [--rounds 3] [--questions 4]

Questions of four endings, as multiple-choice tasks have them: a context of its own each (HellaSwag), or after examples
that all share (a few shots). A position is a token of a sequence that is scored, whether it is computed or found. The
ratio is given of wall time, and of the process's CPU time, which other load on the machine changes less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxllama
from jaxllama.decode.sampling import top_logprobs
from jaxllama.decode.scoring import logits_of

ENDINGS = 4


def main() -> None:
    """Prints the medians of the paired runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with jaxllama.load(args.checkpoint, dtype=args.dtype) as llama:
        for name, shared in (("own contexts", 0), ("shared examples", 300)):
            compare(llama, name, shared, args.questions, args.rounds)


def compare(llama: jaxllama.Llama, name: str, shared: int, questions: int, rounds: int) -> None:
    """One kind of task, `rounds` times each way, in turn."""
    rng = np.random.default_rng(0)

    def some(low: int, high: int) -> list[int]:
        return rng.integers(0, llama.config.vocab_size, rng.integers(low, high)).tolist()

    times: dict[str, list[np.ndarray]] = {"before": [], "now": []}
    for round in range(1 + rounds):
        examples = some(shared, shared + 1) if shared else []
        contexts = [examples + some(40, 100) for _ in range(questions)]
        pairs = [(context, some(10, 30)) for context in contexts for _ in range(ENDINGS)]
        positions = sum(len(context) + len(ending) for context, ending in pairs)
        before, of_before = timed(lambda pairs=pairs: [one_at_a_time(llama, *pair) for pair in pairs])
        now, of_now = timed(lambda pairs=pairs: llama.score(*map(list, zip(*pairs, strict=True)), progress=False))
        worst = max(abs(a - b.logprob) for a, b in zip(of_before, of_now, strict=True))
        if round:  # the first compiles
            times["before"].append(positions / before)
            times["now"].append(positions / now)
    before, now = (np.stack(rates) for rates in times.values())  # [rounds, of wall time and of CPU time]
    ratios = now / before
    (wall, cpu), least, most = np.median(ratios, axis=0), ratios.min(axis=0), ratios.max(axis=0)
    print(
        f"{name}: {np.median(before[:, 0]):.0f} positions/s before, {np.median(now[:, 0]):.0f} now, paired "
        f"{wall:.2f} × ({least[0]:.2f} to {most[0]:.2f}), of CPU time {cpu:.2f} × ({least[1]:.2f} to {most[1]:.2f}); "
        f"sums differ by {worst:.1e} at most",
        flush=True,
    )


def timed(run: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Seconds, by the clock and of the process's CPU time, and what it gives."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = run()
    return np.array([time.perf_counter(), time.process_time()]) - start, result


def one_at_a_time(llama: jaxllama.Llama, context: list[int], ending: list[int]) -> float:
    """The log-probability of `ending`: logits in chunks of 128, the likeliest 20 of each, as until 2026-11-28."""
    tokens, engine = np.array(context + ending, np.int32), llama.engine
    sizes = {"page_size": engine.page_size, "kv_dtype": engine.kv_dtype, "platform": engine.platform}
    found, start = [], 1
    for scores in logits_of(llama.config, llama.params, llama.mesh, tokens, **sizes):
        size = min(scores.shape[0], len(tokens) - start)
        following = np.zeros(scores.shape[0], np.int32)
        following[:size] = tokens[start : start + size]
        found += np.asarray(_summarise(scores, following)[0])[:size].tolist()
        start += size
    return sum(found[len(context) - 1 :])


@jax.jit
def _summarise(scores: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    found = top_logprobs(scores, tokens, jnp.bool_(True))
    rank = 1 + jnp.sum(scores > jnp.take_along_axis(scores, tokens[:, None], axis=1), axis=1)
    return found.chosen, rank, found.values


if __name__ == "__main__":
    main()
