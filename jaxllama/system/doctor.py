"""`jaxllama doctor`: what is installed, which devices there are, and what would go wrong on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax

from jaxllama.errors import one_line
from jaxllama.model.native import library
from jaxllama.model.platforms.startup import has_libtpu, may_have_tpu
from jaxllama.system.progress import is_watched
from jaxllama.system.versions import installed, version_of

type Status = Literal["ok", "note", "warning", "problem"]

_GB = 1e9
_LOW_DISK_BYTES = 5e9
_LOW_MEMORY_BYTES = 2e9
# Extra to the module that shows whether it is installed, and what it is for.
_EXTRAS = {
    "serve": ("aiohttp", "serve, batch, chat and bench"),
    "gguf": ("gguf", "GGUF files"),
    "hub": ("huggingface_hub", "models on the Hugging Face hub"),
    "gcs,s3": ("obstore", "models in buckets"),
    "plot": ("matplotlib", "plots"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `advice` says what to do, where there is anything to do."""

    name: str
    status: Status
    text: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `doctor`."""
    parser.add_argument("--port", type=int, default=8000, help="the port a server would take (default: %(default)s)")
    parser.add_argument(
        "--compilation-cache", metavar="DIR", help="where compiled programs are kept (default: ~/.cache/jaxllama/xla)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found. Returns 1 if something would go wrong, else 0; warnings and notes do not count."""
    cache = Path(args.compilation_cache).expanduser() if args.compilation_cache else _default_cache()
    findings = examine(port=args.port, compilation_cache=cache)
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(as_text(findings), end="")
    return int(any(finding.status == "problem" for finding in findings))


def examine(*, port: int = 8000, compilation_cache: Path | None = None) -> list[Finding]:
    """Looks at everything. A look that itself fails is a finding, too."""
    cache = compilation_cache or _default_cache()
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _extras,
        _devices,
        _kernels,
        lambda: _caches(cache),
        lambda: _disk(cache),
        _memory,
        lambda: _port(port),
        _environment,
    )
    findings: list[Finding] = []
    for look in looks:
        try:
            findings += look()
        except Exception as error:  # Whatever a broken machine makes of it: the other looks go on.
            what = getattr(look, "__name__", "look").strip("_<>")
            findings.append(Finding(what, "problem", f"could not be looked at: {one_line(error)}"))
    return findings


def as_text(findings: list[Finding]) -> str:
    """The findings as lines, and a last one that sums up."""
    marks = {"ok": "ok  ", "note": "note", "warning": "WARN", "problem": "FAIL"}
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.status]}  {finding.name:{width}}  {finding.text}")
        if finding.advice:
            lines.append(f"      {'':{width}}  → {finding.advice}")
    num = {status: sum(finding.status == status for finding in findings) for status in ("problem", "warning")}
    if num["problem"] or num["warning"]:
        lines.append(f"\n{num['problem']} problems, {num['warning']} warnings")
    else:
        lines.append("\nNothing would go wrong here that a look can find.")
    return "\n".join(lines) + "\n"


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    supported = sys.version_info >= (3, 12)
    where = f"{platform.system()} {platform.machine()}"
    yield Finding(
        "python",
        "ok" if supported else "problem",
        f"{python} on {where}",
        "" if supported else "3.12 or newer is needed",
    )
    yield Finding("jaxllama", "ok", f"{version_of('jaxllama') or 'not installed'}, in {Path(__file__).parents[1]}")
    have = installed()
    yield Finding("libraries", "ok", ", ".join(f"{name} {version}" for name, version in have.items()))
    for requirement, version in _too_old():
        yield Finding(
            "libraries", "problem", f"{requirement} is needed, {version} is installed", f"pip install '{requirement}'"
        )
    if "jax" in have and "jaxlib" in have and have["jax"].split(".")[:2] != have["jaxlib"].split(".")[:2]:
        text = f"jax {have['jax']} and jaxlib {have['jaxlib']} do not belong together"
        yield Finding("libraries", "problem", text, f"pip install 'jaxlib=={have['jax']}'")


def _too_old() -> Iterator[tuple[str, str]]:
    """What jaxllama requires of a library, and which version there is, where that is older."""
    try:
        requirements = metadata.requires("jaxllama") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        name, found, least = requirement.split(";")[0].strip().partition(">=")
        version = version_of(name) if found else None
        if version and _numbers(version) < _numbers(least):
            yield f"{name}>={least.split(',')[0]}", version


def _numbers(version: str) -> list[int]:
    parts = version.split(",")[0].split(".")
    return [int("".join(char for char in part if char.isdigit()) or 0) for part in parts[:3]]


def _extras() -> Iterator[Finding]:
    absent = {name: what for name, (module, what) in _EXTRAS.items() if importlib.util.find_spec(module) is None}
    there = [name for name in _EXTRAS if name not in absent]
    yield Finding("extras", "ok", f"installed: {', '.join(there) or 'none'}")
    for name, what in absent.items():
        yield Finding("extras", "note", f"no {what}", f"pip install 'jaxllama[{name}]'")


def _devices() -> Iterator[Finding]:
    started = time.monotonic()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        advice = (
            "end the process that holds it"
            if "use" in str(error)
            else "see the message; JAX_PLATFORMS=cpu leaves it alone"
        )
        yield Finding("devices", "problem", f"JAX cannot start: {one_line(error)}", advice)
        return
    kind = devices[0].device_kind
    took = time.monotonic() - started
    yield Finding("devices", "ok", f"{len(devices)} × {devices[0].platform} ({kind}), found in {took:.1f} s")
    stats: dict[str, Any] = devices[0].memory_stats() or {} if devices[0].platform != "cpu" else {}
    if limit := stats.get("bytes_limit"):
        free = limit - stats.get("bytes_in_use", 0)
        busy = free < 0.8 * limit
        text = f"{free / _GB:.1f} of {limit / _GB:.1f} GB free on the first device"
        yield Finding("devices", "warning" if busy else "ok", text, "another process may hold the rest" if busy else "")
    if devices[0].platform == "cpu" and may_have_tpu():
        advice = "pip install 'jaxllama[tpu]'" if not has_libtpu() else "unset JAX_PLATFORMS"
        yield Finding("devices", "problem", "this machine seems to have a TPU, and JAX runs on the CPU", advice)
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        advice = "pip install 'jaxllama[gpu]'; on Linux, with NVIDIA's driver"
        yield Finding("devices", "warning", "this machine seems to have a GPU, and JAX runs on the CPU", advice)


def _kernels() -> Iterator[Finding]:
    sets = library.supported()
    if not sets:
        yield Finding("CPU kernels", "note", "none for this CPU: models on it run through XLA, slower")
        return
    if any((library.SOURCES / each.file_name).exists() for each in sets):
        yield Finding("CPU kernels", "ok", f"{sets[0].name}, in the package")
        return
    try:
        compiler = shlex.join(library.find_compiler())
    except FileNotFoundError as error:
        advice = "install g++, or pip install 'jaxllama[compiler]', or take a wheel for Linux on x86-64"
        yield Finding("CPU kernels", "warning", f"{error}: models on the CPU run through XLA, slower", advice)
    else:
        yield Finding("CPU kernels", "ok", f"{sets[0].name}, compiled by {compiler} when a model is first loaded")


def _default_cache() -> Path:
    return Path(jax.config.jax_compilation_cache_dir or Path.home() / ".cache" / "jaxllama" / "xla")


def _caches(compilation_cache: Path) -> Iterator[Finding]:
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub"
    folders = {"compiled programs": compilation_cache, "hub": Path(os.environ.get("HF_HUB_CACHE", hub))}
    for name, folder in folders.items():
        if folder.is_dir():
            num_files, num_bytes = _size(folder)
            yield Finding("caches", "ok", f"{name}: {num_bytes / _GB:.2f} GB in {num_files:,} files, {folder}")
    problem = _why_not_writable(compilation_cache)
    if problem:
        text = f"compiled programs cannot be kept in {compilation_cache} ({problem}): every start compiles again"
        yield Finding("caches", "warning", text, "--compilation-cache DIR, a folder that can be written")


def _size(folder: Path) -> tuple[int, int]:
    sizes = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink() and path.is_file():
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def _why_not_writable(folder: Path) -> str:
    """Tries it, in the nearest folder above that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


def _disk(compilation_cache: Path) -> Iterator[Finding]:
    seen = set()
    for name, folder in (
        ("here", Path.cwd()),
        ("caches", compilation_cache),
        ("temporary", Path(tempfile.gettempdir())),
    ):
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        device = folder.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(folder).free
        low = free < _LOW_DISK_BYTES
        text = f"{free / _GB:,.1f} GB free for {folder} ({name})"
        yield Finding(
            "disk", "warning" if low else "ok", text, "an 8B in bfloat16 takes 16 GB, a 70B 141 GB" if low else ""
        )


def _memory() -> Iterator[Finding]:
    free = _free_memory_bytes()
    if free is None:
        yield Finding("memory", "note", "this system does not say how much is free")
        return
    low = free < _LOW_MEMORY_BYTES
    advice = (
        "a model on the CPU needs its weights' size; loading onto other devices up to --max-in-flight" if low else ""
    )
    yield Finding("memory", "warning" if low else "ok", f"{free / _GB:.1f} GB free", advice)


def _free_memory_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                machine = int(line.split()[1]) * 1024
                break
        else:
            return None
    except OSError:
        return None
    # A container may allow less than the machine has.
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return machine
    return min(machine, limit - used)


def _port(port: int) -> Iterator[Finding]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        if os.name != "nt":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or one_line(error)
            yield Finding("port", "problem", f"{port} cannot be had: {why}", "serve --port 0 takes a free one")
            return
    yield Finding("port", "ok", f"{port} is free")


def _environment() -> Iterator[Finding]:
    """What is set and changes how things run. Never a value that may be a secret."""
    shown = (
        "JAX_PLATFORMS",
        "XLA_FLAGS",
        "JAX_COMPILATION_CACHE_DIR",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
    )
    values = [f"{name}={one_line(os.environ[name], 80)}" for name in shown if name in os.environ]
    hidden = [f"{name} is set" for name in ("HF_TOKEN", "JAXLLAMA_API_KEYS", "OPENAI_API_KEY") if os.environ.get(name)]
    if values or hidden:
        yield Finding("environment", "note", "; ".join(values + hidden))
    if "JAXLLAMA_API_KEYS" not in os.environ and is_watched():
        yield Finding(
            "keys", "note", "no API keys in the environment: a server asks for none, and listens on 127.0.0.1 only"
        )
