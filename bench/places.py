"""How fast weights move, beside what the machine does without us: paired, with seconds, CPU seconds and peak RAM.

    python bench/places.py FOLDER [--layers 16] [--keep]

Makes a Llama of 1.24 B parameters with random weights in FOLDER (2.47 GB, four shards) and measures, each in a process
of its own: `cp` and `sync`; `jaxllama convert`; `cat` of its files from the disk and from memory; `jaxllama.load` of
the checkpoint from both; eight parallel range requests of a plain client to a store on loopback; a load from that one.
Dropping caches needs root; without it the cold rows are left out. A virtual machine may get its memory from the host
only when it is touched: what that takes is a row, because no load can be faster. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
_NUM_SHARDS = 4
_RANGE_BYTES = 8 * 2**20
_PEAK = "from jaxllama_convert.memory import peak_ram_bytes; print('PEAK', peak_ram_bytes())"
_CONVERT = f"import sys; from jaxllama_convert import convert; convert(sys.argv[1], sys.argv[2]); {_PEAK}"
_LOAD = (
    "import sys, time; from jaxllama import make_mesh; from jaxllama.weights.opening import open_model;"
    "from jaxllama.weights.loading import load_params; c = open_model(sys.argv[1]); m = make_mesh(c.config, tp=1);"
    "s = time.monotonic(); p = load_params(c, m, None); print('LOAD', time.monotonic() - s); " + _PEAK
)

_TOUCH = "import sys; import numpy as np; np.empty(int(sys.argv[1]), np.uint8)[::4096] = 1"


@dataclass(frozen=True)
class Measured:
    """`inner_s` is without the start of Python and imports, where that is known."""

    name: str
    wall_s: float
    cpu_s: float
    peak_bytes: int
    inner_s: float | None


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", nargs="+", help="parts of the names of what to measure")
    parser.add_argument("--keep", action="store_true", help="leave the model there")
    args = parser.parse_args()
    source, out, copy = (args.folder / name for name in ("src", "out", "copy"))
    try:
        num_bytes = make_model(source, args.layers)
        print(f"{num_bytes:,} bytes, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        print("| what | seconds | without start | CPU seconds | GB/s | peak RAM MiB |")
        print("| --- | --- | --- | --- | --- | --- |")
        for found in _measure(source, out, copy, args.only):
            inner = f"{found.inner_s:.2f}" if found.inner_s else ""
            rate = num_bytes / (found.inner_s or found.wall_s) / 1e9
            peak = f"{found.peak_bytes >> 20}" if found.peak_bytes else ""
            row = (found.name, f"{found.wall_s:.2f}", inner, f"{found.cpu_s:.2f}", f"{rate:.2f}", peak)
            print(f"| {' | '.join(row)} |", flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


def make_model(folder: Path, num_layers: int) -> int:
    """Writes the model, if it is not there. Returns its bytes."""
    from jaxllama.model.config import LlamaConfig
    from jaxllama.model.params import param_specs

    config = CONFIG | {"num_hidden_layers": num_layers}
    specs = sorted(param_specs(LlamaConfig.from_hf(config)), key=lambda spec: spec.hf_name)
    total = sum(2 * spec.size for spec in specs)
    if (folder / "config.json").exists():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    noise = (np.random.default_rng(0).standard_normal(2**22) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint8)
    weight_map: dict[str, str] = {}
    done = 0
    shards: list[list] = [[] for _ in range(_NUM_SHARDS)]
    for spec in specs:
        shards[min(_NUM_SHARDS - 1, done * _NUM_SHARDS // total)].append(spec)
        done += 2 * spec.size
    for index, shard in enumerate(shards):
        name, offset, header = f"model-{index + 1:05}-of-{_NUM_SHARDS:05}.safetensors", 0, {}
        for spec in shard:
            end = offset + 2 * spec.size
            header[spec.hf_name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset, weight_map[spec.hf_name] = end, name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, offset, len(noise)):
                file.write(memoryview(noise[: min(len(noise), offset - start)]))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()
    return total


def _measure(source: Path, out: Path, copy: Path, only: list[str] | None) -> Iterator[Measured]:
    wanted = lambda name: not only or any(part in name for part in only)  # noqa: E731
    cat = f"cat {source}/*.safetensors > /dev/null"
    if wanted("cp"):
        subprocess.run(cat, shell=True, check=True)
        yield _run("cp and sync", ["sh", "-c", f"cp -r {source} {copy} && sync {copy}/*"])
        shutil.rmtree(copy)
    if wanted("convert"):
        subprocess.run(cat, shell=True, check=True)
        shutil.rmtree(out, ignore_errors=True)
        yield _run("convert", [sys.executable, "-c", _CONVERT, str(source), str(out)])
    if not out.exists():
        return
    files = f"find {out} -type f -exec cat {{}} + > /dev/null"
    if wanted("cold") and _drop_caches():
        yield _run("cat, cold disk", ["sh", "-c", files])
        _drop_caches()
        yield _run("load, cold disk", [sys.executable, "-c", _LOAD, str(out)])
    if wanted("memory"):
        num_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        yield _run("first touch of as much RAM", [sys.executable, "-c", _TOUCH, str(num_bytes)])
        subprocess.run(files, shell=True, check=True)
        yield _run("cat, from memory", ["sh", "-c", files])
        yield _run("load, from memory", [sys.executable, "-c", _LOAD, str(out)])
        yield _run("load unconverted, from memory", [sys.executable, "-c", _LOAD, str(source)])
    if wanted("store"):
        with _store(source) as url:
            yield _run("plain client, 8 ranges at once", [sys.executable, __file__, "--client", url, str(source)])
            yield _run("load unconverted, from a store", [sys.executable, "-c", _LOAD, "s3://models/src"])


def _run(name: str, command: list[str]) -> Measured:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall_s, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak, inner = re.search(r"PEAK (\d+)", done.stdout), re.search(r"LOAD ([\d.]+)", done.stdout)
    return Measured(name, wall_s, cpu_s, int(peak[1]) if peak else 0, float(inner[1]) if inner else None)


def _drop_caches() -> bool:
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    return False


@contextlib.contextmanager
def _store(source: Path) -> Iterator[str]:
    """bench/store.py, its objects the files of `source`, for as long as the body runs."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("store.py")), str(source)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        os.environ["AWS_REGION"] = "us-east-1"
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


def client(url: str, source: Path) -> None:
    """Reads all files by ranges of 8 MiB, eight at once, with the standard library's client."""
    import http.client
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from urllib.parse import urlsplit

    local = threading.local()

    def get(job: tuple[str, int, int]) -> None:
        name, start, stop = job
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(urlsplit(url).netloc)
            local.buffer = memoryview(bytearray(_RANGE_BYTES))
        local.connection.request("GET", f"/models/src/{name}", headers={"Range": f"bytes={start}-{stop - 1}"})
        answer, got = local.connection.getresponse(), 0
        while got < stop - start:
            got += answer.readinto(local.buffer[got : stop - start])
        answer.read(0)

    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    jobs = [(n, at, min(at + _RANGE_BYTES, size)) for n, size in sizes.items() for at in range(0, size, _RANGE_BYTES)]
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(get, jobs))
    print("LOAD", time.monotonic() - started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        client(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
