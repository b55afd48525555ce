"""One line of the table, and the table."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax

from jaxllama.errors import one_line
from jaxllama.system.versions import installed, version_of

type Status = Literal["holds", "fails", "note"]

BUDGET_S = 150.0
"""What has not begun by then is left out, the rest of a part too, so that all ends within three minutes: nothing that
has begun takes half a minute on a machine that is idle."""


@dataclass(frozen=True)
class Result:
    """What was looked at, what came out, and what should: in words for people, `figures` for programs.

    A "note" is a figure that nobody has promised.
    """

    part: str
    what: str
    status: Status
    found: str
    expected: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def judged(holds: bool) -> Status:
    """A promise, kept or not."""
    return "holds" if holds else "fails"


def collected(parts: Iterable[tuple[str, Callable[[], Iterator[Result]]]], say: Callable[[str], None]) -> list[Result]:
    """The results of all parts, which are said as they come. A part that raises is itself one that fails, and of one
    that lasts past `BUDGET_S` the rest is left out."""
    results: list[Result] = []
    began = time.monotonic()

    def is_over(name: str, what: str) -> bool:
        if time.monotonic() - began <= BUDGET_S:
            return False
        results.append(Result(name, what, "note", f"{BUDGET_S:.0f} s were over: once more, with warm caches"))
        return True

    for name, run in parts:
        if is_over(name, "left out"):
            continue
        say(f"{name} …")
        started = time.monotonic()
        try:
            for result in run():
                results.append(result)
                say(f"  {result.status:5}  {result.what}: {result.found}")
                if is_over(name, "left out, if there is more"):
                    break
        except Exception as error:  # Whatever the compiler or the device makes of it: the other parts go on.
            results.append(Result(name, "could not be run", "fails", f"{type(error).__name__}: {one_line(error)}"))
            say(f"  fails  {results[-1].found}")
        say(f"  {time.monotonic() - started:.0f} s")
    return results


def environment(devices: list[jax.Device]) -> dict[str, Any]:
    """What runs where: versions, devices, flags."""
    stats: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # Not every device tells.
        stats = devices[0].memory_stats() or {}
    return {
        "versions": {"jaxllama": version_of("jaxllama") or "source", **installed()},
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "bytes_limit": stats.get("bytes_limit"),
        "flags": {name: os.environ[name] for name in _flags(devices[0].platform) if name in os.environ},
    }


def _flags(platform: str) -> tuple[str, ...]:
    common = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")
    return (*common, "LIBTPU_INIT_ARGS") if platform == "tpu" else common


def as_markdown(about: dict[str, Any], results: list[Result], seconds: float) -> str:
    """A table, fit to be pasted into an issue."""
    limit = f", {about['bytes_limit'] / 2**30:.1f} GiB each" if about["bytes_limit"] else ""
    flags = " ".join(f"{name}={value!r}" for name, value in about["flags"].items())
    lines = [
        "### jaxllama check",
        "",
        f"{about['num_devices']} × {about['device_kind']} ({about['platform']}{limit}), "
        f"{', '.join(f'{name} {version}' for name, version in about['versions'].items())}"
        f"{f', `{flags}`' if flags else ''}; {seconds:.0f} s",
        "",
        "| | part | what | found | expected |",
        "| --- | --- | --- | --- | --- |",
    ]
    marks = {"holds": "ok", "fails": "**FAILS**", "note": "note"}
    for result in results:
        cells = (marks[result.status], result.part, result.what, result.found, result.expected)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    count = {status: sum(result.status == status for result in results) for status in marks}
    lines += ["", f"{count['holds']} hold, {count['fails']} do not, {count['note']} notes.", ""]
    return "\n".join(lines)
