"""jaxllama as a contender (turns.py): `Llama.generate`, in a process of its own as its peers are.

    python bench/peers/jaxllama_bench.py CHECKPOINT --dtype int8 --rows 16

`--dtype` is of the weights; beside int8 computation has the checkpoint's. What is decoded is a long output less a short
one of the same prompts, whose prefill is cached.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from turns import PROMPT_TOKENS, take_turns

import jaxllama
from jaxllama.engine.compilation import enable_compilation_cache
from jaxllama.model.native import library


class Contender:
    """A loaded model with as many rows as one would serve."""

    def __init__(self, checkpoint: Path, dtype: str, rows: int, context: int) -> None:
        enable_compilation_cache()
        num_pages = max(rows * 512, 2 * context) // 16 + 1
        options = jaxllama.EngineOptions(max_rows=rows, max_context=context, num_pages=num_pages)
        form: dict[str, Any] = {"quantize": "int8"} if dtype == "int8" else {"dtype": dtype}
        self.llama = jaxllama.load(checkpoint, options=options, **form)
        self.llama.engine.warm_up()
        self.rng = np.random.default_rng()

    def turn(self, of: dict[str, Any]) -> float:
        """Seconds."""
        if of["what"] == "prefill":
            return self.seconds(self.prompts(1, of["tokens"]), 1)
        if of["what"] == "generate":
            return self.seconds(self.prompts(of["rows"], of["prompt_tokens"]), of["steps"])
        prompts = self.prompts(of["rows"], of.get("context", PROMPT_TOKENS))
        self.seconds(prompts, 1)  # the prompts' own pages are in the cache from here on
        return self.seconds(prompts, of["steps"] + 8) - self.seconds(prompts, 8)

    def prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        """Others at every call: the same prompt again would come from the prefix cache."""
        drawn: list[list[int]] = self.rng.integers(100, self.llama.config.vocab_size, (count, num_tokens)).tolist()
        return drawn

    def seconds(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Of one `generate`."""
        params = jaxllama.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        start = time.perf_counter()
        self.llama.generate(prompts, params)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "int8"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--instruction-set", help="of the kernels, if not the best that the CPU has: avx2")
    args = parser.parse_args()
    if args.instruction_set:
        if not library.load([each for each in library.supported() if each.name == args.instruction_set]):
            parser.error(f"no kernels for {args.instruction_set} here")
        library._is_loaded = lambda: True
    contender = Contender(args.checkpoint, args.dtype, args.rows, args.context)
    take_turns(f"jaxllama, {args.dtype}", {"jax": jax.__version__}, contender.turn)


if __name__ == "__main__":
    main()
