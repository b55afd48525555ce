"""Decode, prefill and serving speed beside transformers, taking turns in one run. Prints a table and writes a plot.

    make bench
    python bench/speed.py CHECKPOINT --gguf FILE --peer-python .oracle-venv/bin/python [--rows 1 16] [--repeats 3]

The checkpoint and the GGUF file must be of one model. Every round measures jaxllama, then the peer in a process of its
own; the ratio is taken round by round, and its median counts, so that the machine's drift cancels out. The machine
should be idle otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

import jaxllama
from jaxllama.compilation import enable_compilation_cache

PEER = Path(__file__).parent / "peers" / "transformers_bench.py"


def main() -> None:
    args = parse_args()
    enable_compilation_cache()
    options = jaxllama.EngineOptions(max_rows=max(args.rows), max_context=4096)
    llama = jaxllama.load(args.checkpoint, options=options)
    llama.engine.warm_up()
    rounds = []
    for index in range(args.repeats):
        rounds.append({"ours": measure_ours(llama, args), "peer": measure_peer(args)})
        print(f"round {index + 1} of {args.repeats}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    results = summarise(rounds)
    if args.streams:
        results |= measure_serving(llama, args)
    llama.close()
    print_table(results)
    plot(results, args.plot)


def measure_ours(llama: jaxllama.Llama, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second by what was measured."""
    speeds = {}
    rng = np.random.default_rng(0)
    for rows in args.rows:
        prompts = rng.integers(100, llama.config.vocab_size, (rows, args.prompt_tokens)).tolist()
        speeds[f"decode, {rows} rows"] = rows * args.new_tokens / decode_seconds(llama, prompts, args.new_tokens)
    unseen = np.random.default_rng()  # the same prompt again would come from the prefix cache
    seconds = []
    for _ in range(3):
        prompt = unseen.integers(100, llama.config.vocab_size, args.prefill_tokens).tolist()
        start = time.perf_counter()
        llama.generate(prompt, jaxllama.SamplingParams(temperature=0, max_tokens=1))
        seconds.append(time.perf_counter() - start)
    speeds[f"prefill, {args.prefill_tokens} tokens"] = args.prefill_tokens / statistics.median(seconds)
    return speeds


def decode_seconds(llama: jaxllama.Llama, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds for `num_tokens` more tokens of every row: a long output less a short one, without the prefill."""

    def seconds(max_tokens: int) -> float:
        start = time.perf_counter()
        llama.generate(prompts, jaxllama.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
        return time.perf_counter() - start

    return statistics.median(seconds(num_tokens + 8) - seconds(8) for _ in range(3))


def measure_peer(args: argparse.Namespace) -> dict[str, float]:
    """The same of transformers and torch, bfloat16, at its best setting."""
    command = [str(args.peer_python), str(PEER), "--gguf", str(args.gguf), "--dtype", "bfloat16", "--repeats", "3"]
    command += ["--rows", *map(str, args.rows), "--new-tokens", str(args.new_tokens)]
    command += ["--modes", "loop", "generate", "generate_static"]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--prefill-tokens", str(args.prefill_tokens)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    speeds = {f"decode, {entry['rows']} rows": entry["tok_s"] for entry in result["decode"]}
    return speeds | {f"prefill, {args.prefill_tokens} tokens": result["prefill"]["tok_s"]}


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and the median of the rounds' ratios."""
    return {
        name: {
            "ours": statistics.median(r["ours"][name] for r in rounds),
            "peer": statistics.median(r["peer"][name] for r in rounds),
            "ratio": statistics.median(r["ours"][name] / r["peer"][name] for r in rounds),
        }
        for name in rounds[0]["ours"]
    }


def measure_serving(llama: jaxllama.Llama, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Concurrent HTTP streams beside one `generate` of as many rows, prefill included in both."""
    url = f"http://127.0.0.1:{args.port}"
    command = [sys.executable, "-m", "jaxllama", "serve", str(args.checkpoint), "--port", str(args.port)]
    command += ["--max-rows", str(args.streams), "--max-context", "4096", "--log-level", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ratios, served, offline = [], [], []
    try:
        asyncio.run(wait_until_ready(url))
        question = [{"role": "user", "content": "Tell me a long story about a lighthouse keeper and the sea."}]
        assert llama.chat_template is not None
        assert llama.tokenizer is not None
        prompt = llama.tokenizer.encode_rendered(llama.chat_template.render(question))
        params = jaxllama.SamplingParams(temperature=0, max_tokens=args.stream_tokens, ignore_eos=True)
        for _ in range(args.repeats):
            start = time.perf_counter()
            asyncio.run(stream_all(url, question, args))
            served.append(args.streams * args.stream_tokens / (time.perf_counter() - start))
            start = time.perf_counter()
            llama.generate([prompt] * args.streams, params)
            offline.append(args.streams * args.stream_tokens / (time.perf_counter() - start))
            ratios.append(served[-1] / offline[-1])
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    name = f"served, {args.streams} streams (peer: generate)"
    medians = [statistics.median(values) for values in (served, offline, ratios)]
    return {name: dict(zip(("ours", "peer", "ratio"), medians, strict=True))}


async def wait_until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            try:
                async with session.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.5)
    raise TimeoutError("the server is not ready after 300 s")


async def stream_all(url: str, messages: list[dict[str, str]], args: argparse.Namespace) -> None:
    body: dict[str, Any] = {"model": args.checkpoint.resolve().name, "messages": messages, "stream": True}
    body |= {"temperature": 0, "max_tokens": args.stream_tokens, "ignore_eos": True}

    async def one(session: aiohttp.ClientSession) -> None:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            text = await response.text()
            assert text.rstrip().endswith("[DONE]"), text[-200:]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        await asyncio.gather(*[one(session) for _ in range(args.streams)])


def print_table(results: dict[str, dict[str, float]]) -> None:
    print(f"{'tokens/s':44} {'jaxllama':>9} {'peer':>9} {'ratio':>6}")
    for name, row in results.items():
        print(f"{name:44} {row['ours']:9.1f} {row['peer']:9.1f} {row['ratio']:6.2f}")


def plot(results: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.7 * len(results) + 1.4), layout="constrained")
    names = list(results)[::-1]
    ratios = [results[name]["ratio"] for name in names]
    bars = axis.barh(names, ratios, color=["#3b7dd8" if ratio >= 1 else "#b9c4d0" for ratio in ratios])
    axis.bar_label(
        bars,
        [f"{r:.2f}×  ({results[n]['ours']:.0f} tok/s)" for n, r in zip(names, ratios, strict=True)],
        padding=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    axis.axvline(1, color="black", linewidth=0.8, zorder=0)
    axis.set_xlim(0, max(ratios) * 1.35)
    axis.set_xlabel(
        f"speed relative to the peer (transformers; served: generate)\n{os.cpu_count()} CPU cores, bfloat16"
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path, required=True, help="the same model, for the peer")
    parser.add_argument("--peer-python", type=Path, required=True, help="python of the oracle's environment")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--streams", type=int, default=16, help="0 leaves the server out")
    parser.add_argument("--stream-tokens", type=int, default=96)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("bench/speed.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
