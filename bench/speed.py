"""Speed on a CPU beside llama.cpp and transformers, in turns: decode, prefill, HTTP, long contexts, memory, start.

    make bench
    python bench/speed.py CHECKPOINT --gguf FILE --llamacpp-python PYTHON --peer-python PYTHON [--only bf16 int8 …]

The checkpoint and the GGUF file must be of one model. Contenders are processes that stay, and take turns on a machine
that should be idle otherwise; of three rounds the ratios' median counts, so that the machine's drift cancels out. Each
group of rows ends in under three minutes on two cores and can be run by itself; all of them in ten. A contender that is
not named is left out. llama.cpp needs an environment of its own: see peers/llamacpp_bench.py. Decoding transformers'
bfloat16 takes a few steps only, which on most CPUs take longest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import measure_memory, measure_serving, measure_start

BENCH = Path(__file__).parent
ROUNDS = 3
FEW_TOKENS, MANY_TOKENS = 256, 4096


@dataclass(frozen=True)
class Row:
    """`ours` beside `theirs`; `unit` "tokens/s" is better when more, "ms", "s" and "MB" when less."""

    name: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    asked: str


class Contender:
    """A process that measures when it is asked (peers/turns.py)."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._command = command
        self.name = str(self._answer()["name"])

    def seconds(self, **what: Any) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"it ended: {' '.join(self._command)}")
        return json.loads(line)


@dataclass
class Bench:
    """Who can take part, and what was measured."""

    args: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    @contextmanager
    def contenders(self, **given: tuple[str, list[str]]) -> Iterator[dict[str, Contender]]:
        """By key: `(program, its options)`; those whose Python is not named are left out."""
        started: dict[str, Contender] = {}
        try:
            for key, (program, options) in given.items():
                command = self._command(program)
                if command is not None:
                    started[key] = Contender([*command, *options])
            yield started
        finally:
            for contender in started.values():
                contender.close()

    def _command(self, program: str) -> list[str] | None:
        script = str(BENCH / "peers" / f"{program}_bench.py")
        if program == "jaxllama":
            chosen = ["--instruction-set", self.args.instruction_set] if self.args.instruction_set else []
            return [sys.executable, script, str(self.args.checkpoint), *chosen]
        python = self.args.llamacpp_python if program == "llamacpp" else self.args.peer_python
        return None if python is None else [str(python), script, "--gguf", str(self.args.gguf)]

    def compare(
        self, name: str, runs: dict[str, Callable[[], float]], pairs: dict[str, str], unit: str = "tokens/s"
    ) -> None:
        """`runs` in turns, `ROUNDS` times after once for nothing; rows of "ours" beside each of `pairs`, which says
        what is asked."""
        for run in runs.values():
            run()
        got: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(ROUNDS):
            for key, run in runs.items():
                got[key].append(run())
        for key, asked in pairs.items():
            if key in got:
                ratio = statistics.median(a / b for a, b in zip(got["ours"], got[key], strict=True))
                ours, theirs = statistics.median(got["ours"]), statistics.median(got[key])
                self.add(Row(f"{name}, beside {key}", unit, ours, theirs, ratio, asked))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row.name:58} {row.ours:9.1f} {row.theirs:9.1f} {row.unit:9} {row.ratio:6.2f}  {row.asked}", flush=True)


def decode(contender: Contender, rows: int, steps: int) -> Callable[[], float]:
    return lambda: rows * steps / contender.seconds(what="decode", rows=rows, steps=steps)


def prefill(contender: Contender, tokens: int) -> Callable[[], float]:
    return lambda: tokens / contender.seconds(what="prefill", tokens=tokens)


def group_bf16(bench: Bench) -> None:
    """Decoding 1, 16 and 32 rows in bfloat16."""
    of = {"ours": ("jaxllama", []), "llama.cpp BF16": ("llamacpp", []), "transformers bfloat16": ("transformers", [])}
    with bench.contenders(**of) as by_name:
        for rows, steps, asked in ((1, 48, ">= 1.0"), (16, 24, ">= 1.5"), (32, 16, ">= 1.5")):
            few = {"transformers bfloat16": min(steps, 24 // rows)}
            runs = {
                name: decode(one, rows, few.get(name, steps)) for name, one in by_name.items() if few.get(name, steps)
            }
            bench.compare(f"decode, bf16, {rows} rows", runs, {"llama.cpp BF16": asked, "transformers bfloat16": ""})


def group_f32(bench: Bench) -> None:
    """Decoding in float32."""
    f32 = ["--dtype", "float32", "--rows", "16"]
    with bench.contenders(**{"ours": ("jaxllama", f32), "llama.cpp F32": ("llamacpp", f32)}) as by_name:
        for rows, steps, asked in ((1, 32, ">= 1.0"), (16, 16, "")):
            runs = {name: decode(one, rows, steps) for name, one in by_name.items()}
            bench.compare(f"decode, f32, {rows} rows", runs, {"llama.cpp F32": asked})


def group_int8(bench: Bench) -> None:
    """Decoding one row with int8 weights, also beside our own bfloat16."""
    int8, one_row = ["--dtype", "int8", "--rows", "1"], ["--rows", "1"]
    of = {
        "ours": ("jaxllama", int8),
        "llama.cpp Q8_0": ("llamacpp", int8),
        "our own bf16": ("jaxllama", one_row),
    }
    with bench.contenders(**of) as by_name:
        runs = {name: decode(one, 1, 64) for name, one in by_name.items()}
        bench.compare("decode, int8, 1 row", runs, {"llama.cpp Q8_0": ">= 1.0", "our own bf16": ">= 1.5"})


def group_prefill(bench: Bench) -> None:
    """A prompt of 512 tokens."""
    of = {
        "ours": ("jaxllama", ["--rows", "1"]),
        "llama.cpp BF16": ("llamacpp", ["--rows", "1"]),
        "transformers bfloat16": ("transformers", []),
        "transformers float32": ("transformers", ["--dtype", "float32"]),
    }
    with bench.contenders(**of) as by_name:
        runs = {name: prefill(one, 512) for name, one in by_name.items()}
        asked = {"llama.cpp BF16": ">= 1.5", "transformers bfloat16": ">= 1.2", "transformers float32": ">= 1.2"}
        bench.compare("prefill, bf16, 512 tokens", runs, asked)


def group_context(bench: Bench) -> None:
    """A step of one row with a long context beside a short one."""
    options = ["--rows", "1", "--context", str(MANY_TOKENS + 256)]
    with bench.contenders(ours=("jaxllama", options)) as by_name:

        def step_ms(context: int) -> Callable[[], float]:
            return lambda: 1e3 / 64 * by_name["ours"].seconds(what="decode", rows=1, steps=64, context=context)

        beside = f"{FEW_TOKENS} tokens"
        runs = {"ours": step_ms(MANY_TOKENS), beside: step_ms(FEW_TOKENS)}
        bench.compare(f"a step of 1 row at {MANY_TOKENS} tokens", runs, {beside: "<= 1.4"}, unit="ms")


def group_http(bench: Bench) -> None:
    """32 streams over HTTP beside `generate` of as many rows; and the first token of an idle server."""
    rows = bench.args.streams
    with bench.contenders(ours=("jaxllama", ["--rows", str(rows)])) as by_name:

        def generate(steps: int, count: int, tokens: int) -> float:
            return by_name["ours"].seconds(what="generate", rows=count, steps=steps, prompt_tokens=tokens)

        served = measure_serving(bench.args.checkpoint, rows, bench.args.port, ROUNDS, generate)
    for name, unit, pairs, asked in served:
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        bench.add(Row(name, unit, ours, theirs, statistics.median(a / b for a, b in pairs), asked))


def group_process(bench: Bench) -> None:
    """What the server's process holds after warm-up, and how long it takes to be ready, with caches and without."""
    name = "resident memory, beside its arrays and 600 MB"
    resident, arrays = measure_memory(bench.args.checkpoint, bench.args.port)
    bench.add(Row(name, "MB", resident, arrays + 600, resident / (arrays + 600), "<= 1.0"))
    with tempfile.TemporaryDirectory() as cache:
        for what, limit in (("empty caches", 25.0), ("caches", 5.0)):
            seconds = measure_start(bench.args.checkpoint, bench.args.port, Path(cache))
            bench.add(Row(f"start with {what}", "s", seconds, limit, seconds / limit, "<= 1.0"))


GROUPS: dict[str, Callable[[Bench], None]] = {
    "bf16": group_bf16,
    "f32": group_f32,
    "int8": group_int8,
    "prefill": group_prefill,
    "context": group_context,
    "http": group_http,
    "process": group_process,
}


def limits() -> str:
    """GB/s of memory and GFLOP/s of float32, by all cores at once."""
    with tempfile.TemporaryDirectory() as folder:
        program, flags = f"{folder}/limits", ["-O3", "-march=native", "-pthread", "-std=c++17"]
        subprocess.run(["c++", *flags, str(BENCH / "limits.cc"), "-o", program], check=True)
        found = subprocess.run([program, str(os.cpu_count())], check=True, capture_output=True, text=True).stdout
    read, multiplied = found.split()
    return f"{os.cpu_count()} cores: {read} GB/s read from memory, {multiplied} GFLOP/s of float32"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same model, for the peers")
    parser.add_argument("--peer-python", type=Path, help="python of the oracle's environment, with transformers")
    parser.add_argument("--llamacpp-python", type=Path, help="python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--only", nargs="+", choices=tuple(GROUPS), default=[*GROUPS])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--instruction-set", help="of our kernels, not the CPU's best: avx2; servers have the best")
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    if args.gguf is None and (args.peer_python or args.llamacpp_python):
        parser.error("the peers need --gguf")
    return args


def main() -> None:
    bench, began = Bench(parse_args()), time.monotonic()
    print(limits())
    print(f"{'':58} {'jaxllama':>9} {'beside':>9} {'':9} {'ratio':>6}  asked")
    for name in bench.args.only:
        GROUPS[name](bench)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
