"""A plan as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from jaxllama.errors import MissingExtraError
from jaxllama.model.params import num_params
from jaxllama.plan.planner import Plan, describe_mesh

_GIB = 2**30
_COLOURS = {"weights": "#2b5c8a", "kv": "#e08e45", "state": "#8d6a9f", "temporaries": "#b0473c"}


def check_plotting() -> None:
    """Raises: MissingExtraError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plot", "matplotlib")


def save_plot(p: Plan, path: Path) -> None:
    """Writes a stacked bar of one device's HBM and the step's time against the number of rows.

    The file's ending names the format, as matplotlib knows them.

    Raises: MissingExtraError without matplotlib; OSError.
    """
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.4))
    _memory_bar(left, p)
    _latency_curve(right, p)
    s = p.setup
    figure.suptitle(
        f"{num_params(s.config) / 1e9:.1f}B, {s.weights} weights, {s.kv} KV on {describe_mesh(s)} ({p.method})",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _memory_bar(axes: Any, p: Plan) -> None:
    bottom, limit = 0.0, p.memory.available / _GIB
    for name, colour in _COLOURS.items():
        height = getattr(p.memory, name) / _GIB
        axes.bar(0, height, bottom=bottom, width=0.5, color=colour, label=f"{name} {height:.2f}")
        bottom += height
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(0.74, limit, f"HBM {limit:.2f}", ha="right", va="bottom", fontsize=9)
    axes.set(xlim=(-0.75, 0.75), ylim=(0, 1.45 * max(bottom, limit)), xticks=[], ylabel="GiB on each device")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left", frameon=False)
    axes.set_title(f"{'fits' if p.fits else 'does not fit'}: {p.setup.rows:,} rows of {p.setup.context:,}", fontsize=10)


def _latency_curve(axes: Any, p: Plan) -> None:
    data = p.setup.data
    last = max(p.max_rows, p.setup.rows) // data
    rows = sorted({data * max(1, round(last * i / 60)) for i in range(61)} | {p.setup.rows})
    step = [1e3 * p.step_seconds_at(r) for r in rows]
    low, high, roof = (
        [value * bound / p.step.seconds for value in step] for bound in (p.step.low, p.step.high, p.step.roofline)
    )
    axes.fill_between(rows, low, high, color="#2b5c8a", alpha=0.15, label="range")
    axes.plot(rows, step, color="#2b5c8a", label="estimate")
    axes.plot(rows, roof, color="grey", linestyle=":", label="roofline")
    axes.plot([p.setup.rows], [1e3 * p.step.seconds], "o", color="#b0473c", label=f"{p.setup.rows:,} rows: asked for")
    if p.max_rows:
        axes.axvline(
            p.max_rows, color="black", linestyle="--", linewidth=1, label=f"{p.max_rows:,} rows: the most that fit"
        )
    axes.set(xlabel=f"rows of {p.setup.context:,} tokens", ylabel="ms a step (one token of every row)")
    axes.set_xlim(0, 1.04 * rows[-1])
    axes.set_ylim(0, 1.4 * max(high))
    axes.legend(fontsize=8, loc="upper left", ncols=2)
    axes.grid(alpha=0.3)
