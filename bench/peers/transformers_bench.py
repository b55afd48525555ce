"""transformers on torch as a contender (turns.py), on a CPU.

    python bench/peers/transformers_bench.py --gguf FILE --dtype bfloat16 --threads 2

Runs in the oracle's environment. Greedy, without end-of-sequence, in inference mode with sdpa attention: a plain loop
over the model with a growing cache, the least that transformers can do (`generate` takes a little longer). Nothing is
compiled.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "oracle"))
from load_gguf import load_llama
from turns import PROMPT_TOKENS, take_turns


def time_decode(model: Any, rows: int, num_prompt: int, num_steps: int) -> float:
    """Seconds for `num_steps` tokens of each row after the prompts."""
    prompt = random_tokens(model, rows, num_prompt)
    out = model(prompt, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(num_steps):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def time_prefill(model: Any, num_tokens: int) -> float:
    """Seconds for one prompt, with the logits of its last token alone."""
    prompt = random_tokens(model, 1, num_tokens)
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def random_tokens(model: Any, rows: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(100, model.config.vocab_size, (rows, num_tokens), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        model = load_llama(str(args.gguf), getattr(torch, args.dtype))

        def turn(of: dict[str, Any]) -> float:
            if of["what"] == "prefill":
                return time_prefill(model, of["tokens"])
            return time_decode(model, of["rows"], PROMPT_TOKENS, of["steps"])

        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        take_turns(f"transformers, {args.dtype}", versions, turn)


if __name__ == "__main__":
    main()
