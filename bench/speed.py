"""Decode, prefill, serving, time to first token and the cost of context, beside transformers and llama.cpp, which take
turns in one run. Prints a table and writes a plot.

    make bench
    python bench/speed.py CHECKPOINT --gguf FILE --peer-python .oracle-venv/bin/python [--rows 1 16 32] [--repeats 3]
        [--llamacpp-python PYTHON]

The checkpoint and the GGUF file must be of one model. Every round measures jaxllama, then each peer in a process of its
own; the ratio is taken round by round, and its median counts, so that the machine's drift cancels out. The machine
should be idle otherwise. llama.cpp needs an environment of its own: see peers/llamacpp_bench.py.
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
from jaxllama.engine.compilation import enable_compilation_cache

PEERS = Path(__file__).parent / "peers"
FEW_TOKENS, MANY_TOKENS = 256, 4096
MAX_CONTEXT = MANY_TOKENS + 256
type Results = dict[str, dict[str, float]]
"""By what was measured: ours, the peer's, and their ratio."""


def main() -> None:
    args = parse_args()
    enable_compilation_cache()
    llamas = {rows: load(args, rows) for rows in sorted({*args.rows, *args.context_rows, args.streams} - {0})}
    rounds: list[dict[str, dict[str, float]]] = []
    for index in range(args.repeats):
        rounds.append({"ours": measure_ours(llamas, args), "transformers": measure_transformers(args)})
        if args.llamacpp_python is not None:
            rounds[-1]["llama.cpp"] = measure_llamacpp(args)
        print(f"round {index + 1} of {args.repeats}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    speeds, times = summarise(rounds), {}
    for rows in args.context_rows:
        times |= measure_context(llamas[rows], rows, args)
    if args.streams:
        served, first = measure_serving(llamas[args.streams], args)
        speeds |= served
        times |= first
    for llama in llamas.values():
        llama.close()
    print_table("tokens/s, more is better", speeds)
    print_table("ms, less is better", times)
    plot(speeds, args.plot)


def load(args: argparse.Namespace, rows: int) -> jaxllama.Llama:
    """The model with as many rows as are measured, as one would serve them."""
    num_pages = rows * MAX_CONTEXT // 16 + 1 if rows in args.context_rows else None
    options = jaxllama.EngineOptions(max_rows=rows, max_context=MAX_CONTEXT, num_pages=num_pages)
    llama = jaxllama.load(args.checkpoint, options=options)
    llama.engine.warm_up()
    return llama


def measure_ours(llamas: dict[int, jaxllama.Llama], args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second by what was measured."""
    speeds = {}
    rng = np.random.default_rng(0)
    for rows in args.rows:
        prompts = rng.integers(100, llamas[rows].config.vocab_size, (rows, args.prompt_tokens)).tolist()
        seconds = decode_seconds(llamas[rows], prompts, args.new_tokens)
        speeds[f"decode, {rows} rows"] = rows * args.new_tokens / seconds
    prompts = unseen_prompts(llamas[args.rows[0]], 3, args.prefill_tokens)
    seconds = statistics.median(first_token_seconds(llamas[args.rows[0]], prompt) for prompt in prompts)
    speeds[f"prefill, {args.prefill_tokens} tokens"] = args.prefill_tokens / seconds
    return speeds


def unseen_prompts(llama: jaxllama.Llama, count: int, num_tokens: int) -> list[list[int]]:
    """Others at every call: the same prompt again would come from the prefix cache."""
    prompts: list[list[int]] = (
        np.random.default_rng().integers(100, llama.config.vocab_size, (count, num_tokens)).tolist()
    )
    return prompts


def first_token_seconds(llama: jaxllama.Llama, prompt: list[int]) -> float:
    """Seconds to the first token, text included, without HTTP."""
    start = time.perf_counter()
    llama.generate(prompt, jaxllama.SamplingParams(temperature=0, max_tokens=1))
    return time.perf_counter() - start


def measure_context(llama: jaxllama.Llama, rows: int, args: argparse.Namespace) -> Results:
    """Milliseconds of a step with a long context beside a short one."""
    num_tokens, ms = 32, []
    for context in (MANY_TOKENS, FEW_TOKENS):
        seconds = decode_seconds(llama, unseen_prompts(llama, rows, context), num_tokens, args.repeats)
        ms.append(1e3 * seconds / num_tokens)
    name = f"a step of {rows} rows at {MANY_TOKENS} tokens (beside: at {FEW_TOKENS})"
    return {name: {"ours": ms[0], "peer": ms[1], "ratio": ms[0] / ms[1]}}


def decode_seconds(llama: jaxllama.Llama, prompts: list[list[int]], num_tokens: int, repeats: int = 3) -> float:
    """Seconds for `num_tokens` more tokens of every row: a long output less a short one, without the prefill."""

    def seconds(max_tokens: int) -> float:
        start = time.perf_counter()
        llama.generate(prompts, jaxllama.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
        return time.perf_counter() - start

    seconds(1)  # the prompts' own pages are in the cache from here on
    return statistics.median(seconds(num_tokens + 8) - seconds(8) for _ in range(repeats))


def measure_transformers(args: argparse.Namespace) -> dict[str, float]:
    """The same of transformers and torch, bfloat16, at its best setting."""
    modes = ["--modes", "loop", "generate", "generate_static", "--prefill-tokens", str(args.prefill_tokens)]
    return measure_peer(args, args.peer_python, "transformers_bench.py", modes)


def measure_llamacpp(args: argparse.Namespace) -> dict[str, float]:
    """The same of llama.cpp, BF16; its prefill is of 512 tokens always."""
    return measure_peer(args, args.llamacpp_python, "llamacpp_bench.py", [])


def measure_peer(args: argparse.Namespace, python: Path, script: str, more: list[str]) -> dict[str, float]:
    command = [str(python), str(PEERS / script), "--gguf", str(args.gguf), "--dtype", "bfloat16", "--repeats", "3"]
    command += ["--rows", *map(str, args.rows), "--new-tokens", str(args.new_tokens)]
    command += ["--prompt-tokens", str(args.prompt_tokens), *more]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    speeds = {f"decode, {entry['rows']} rows": entry["tok_s"] for entry in result["decode"]}
    return speeds | {f"prefill, {result['prefill']['tokens']} tokens": result["prefill"]["tok_s"]}


def summarise(rounds: list[dict[str, dict[str, float]]]) -> Results:
    """Medians, and the median of the rounds' ratios."""
    return {
        f"{name} (peer: {peer})": {
            "ours": statistics.median(r["ours"][name] for r in rounds),
            "peer": statistics.median(r[peer][name] for r in rounds),
            "ratio": statistics.median(r["ours"][name] / r[peer][name] for r in rounds),
        }
        for peer in list(rounds[0])[1:]
        for name in rounds[0]["ours"]
        if name in rounds[0][peer]
    }


def measure_serving(llama: jaxllama.Llama, args: argparse.Namespace) -> tuple[Results, Results]:
    """Concurrent HTTP streams beside one `generate` of as many rows, prefill included in both; and how long an idle
    server takes to the first token of a short prompt, beside `generate` of one token: a chunk and a step."""
    url = f"http://127.0.0.1:{args.port}"
    command = [sys.executable, "-m", "jaxllama", "serve", str(args.checkpoint), "--port", str(args.port)]
    command += ["--max-rows", str(args.streams), "--max-context", str(MAX_CONTEXT), "--log-level", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ratios, served, offline = [], [], []
    first, chunk_and_step = [], []
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
        for prompt in unseen_prompts(llama, 20, 24):
            first.append(1e3 * asyncio.run(first_token_of_server(url, prompt[:-1], args)))
            chunk_and_step.append(1e3 * first_token_seconds(llama, prompt[1:]))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    speeds = {"ours": statistics.median(served), "peer": statistics.median(offline), "ratio": statistics.median(ratios)}
    times = {"ours": statistics.median(first), "peer": statistics.median(chunk_and_step)}
    times["ratio"] = times["ours"] / times["peer"]
    name = "first token, 23 tokens, idle server (beside: chunk and step)"
    return {f"served, {args.streams} streams (peer: generate)": speeds}, {name: times}


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


async def first_token_of_server(url: str, prompt: list[int], args: argparse.Namespace) -> float:
    """Seconds from a request on a new connection to the first event of its stream."""
    body = {"model": args.checkpoint.resolve().name, "prompt": prompt, "stream": True, "temperature": 0}
    start = time.perf_counter()
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json=body | {"max_tokens": 4, "ignore_eos": True}) as response,
    ):
        response.raise_for_status()
        line = await response.content.readline()
        assert line.startswith(b"data: {"), line
        return time.perf_counter() - start


def print_table(unit: str, results: Results) -> None:
    print(f"{unit:60} {'jaxllama':>9} {'peer':>9} {'ratio':>6}")
    for name, row in results.items():
        print(f"{name:60} {row['ours']:9.1f} {row['peer']:9.1f} {row['ratio']:6.2f}")


def plot(results: Results, path: Path) -> None:
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
    axis.set_xlabel(f"speed relative to the peer\n{os.cpu_count()} CPU cores, bfloat16")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path, required=True, help="the same model, for the peer")
    parser.add_argument("--peer-python", type=Path, required=True, help="python of the oracle's environment")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--llamacpp-python", type=Path, help="python of an environment with llama-cpp-python and gguf")
    parser.add_argument(
        "--context-rows", type=int, nargs="*", default=[1], help="rows to measure the cost of context at"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--streams", type=int, default=32, help="0 leaves the server out")
    parser.add_argument("--stream-tokens", type=int, default=96)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("bench/speed.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
