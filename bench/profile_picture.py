"""Draws `docs/_static/profile.svg`, one decode step of a trace of the default model on a CPU.

    python bench/profile_picture.py DIR docs/_static/profile.svg

`DIR` is what `POST /admin/profile` answered. Layers and the head are kernels of ours there, `ffi_call.N` in the trace.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from statistics import median
from typing import Any

import jax
import matplotlib as mpl
from matplotlib import pyplot as plt

MODULE = "jit_decode_steps"
COLOURS = {
    "layer": "#4c78a8",
    "head": "#f58518",
    "sampling and the rest": "#54a24b",
    "launches": "#b279a2",
    "waits": "#cccccc",
}


def main() -> None:
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "jaxllama"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    (path,) = args.folder.rglob("*.xplane.pb")
    operations, calls = read(path)
    steps = steps_of(operations)
    # One of the fastest: other programs of the machine hold up the others.
    step = sorted(steps, key=lambda events: events[-1][1] - events[0][0])[len(steps) // 10]
    draw(step, calls, args.picture)
    totals = {kind: median(sum(b - a for a, b, k in events if k == kind) for events in steps) for kind in COLOURS}
    print(f"{len(steps)} steps, median ms: " + ", ".join(f"{kind} {1e3 * s:.2f}" for kind, s in totals.items() if s))


def read(path: Path) -> tuple[list[tuple[float, float, str]], list[tuple[float, float, str]]]:
    """The device's operations (start, end, name) in seconds, and the engine's calls."""
    operations, calls = [], []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                span = (event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9, event.name)
                stats: dict[str, Any] = dict(event.stats)
                if stats.get("hlo_module") == MODULE and not event.name.startswith(("while", "cond")):
                    operations.append(span)
                elif event.name.startswith(("decode of", "np.asarray")):
                    calls.append(span)
    return sorted(operations), sorted(calls)


def steps_of(operations: list[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """The operations of each whole step, by kind. The highest kernel is the head, the others are layers."""
    numbers = [int(found[1]) for *_, name in operations if (found := re.fullmatch(r"ffi_call\.(\d+)", name))]
    first, head = min(numbers), max(numbers)
    steps: list[list[tuple[float, float, str]]] = []
    for start, end, name in operations:
        if name == f"ffi_call.{first}":
            steps.append([])
        kind = "head" if name == f"ffi_call.{head}" else "layer" if "ffi_call" in name else "sampling and the rest"
        if steps:
            steps[-1].append((start, end, kind))
    whole = head - first
    return [events for events in steps[:-1] if sum(kind == "layer" for *_, kind in events) == whole]


def draw(step: list[tuple[float, float, str]], calls: list[tuple[float, float, str]], picture: Path) -> None:
    """Above what the device does, below what the engine's thread does meanwhile."""
    begin, end = step[0][0], step[-1][1]
    figure, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
    for start, stop, kind in step:
        axes.broken_barh(
            [((start - begin) * 1e3, (stop - start) * 1e3)], (1.1, 0.8), color=COLOURS[kind], ec="white", lw=0.4
        )
    for start, stop, name in calls:
        if stop > begin and start < end:
            kind = "waits" if name.startswith("np.") else "launches"
            low, high = max(start, begin), min(stop, end)
            axes.broken_barh([((low - begin) * 1e3, (high - low) * 1e3)], (0.1, 0.8), color=COLOURS[kind])
            if high - low > (end - begin) / 5:
                label = "waits for the device (np.asarray)" if kind == "waits" else name
                axes.text(((low + high) / 2 - begin) * 1e3, 0.5, label, ha="center", va="center", fontsize=9)
    axes.set(yticks=[0.5, 1.5], yticklabels=["engine's thread", "device"], ylim=(0, 2), xlim=(0, (end - begin) * 1e3))
    axes.set_xlabel("milliseconds")
    layers = sum(kind == "layer" for *_, kind in step)
    names = {"layer": f"{layers} layers", "launches": "launches the next program"}
    shown = [kind for kind in COLOURS if kind != "waits"]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in shown]
    labels = [names.get(kind, kind) for kind in shown]
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=4, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
