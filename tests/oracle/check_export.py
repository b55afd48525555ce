"""Loads what `jaxllama export` wrote with transformers, and compares the logits with those that jaxllama gave.

    python tests/oracle/check_export.py FOLDER [FOLDER …]

A FOLDER has `hf/`, an export, and `logits.npz` with `ids [T]` and jaxllama's float32 `logits [T, V]`. Prints a line of
JSON for each: the largest difference over the logits' spread, and what transformers had to say about names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def check(folder: Path) -> dict[str, object]:
    """Keys that are missing or unexpected, and the difference."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    stored = np.load(folder / "logits.npz")
    with torch.inference_mode():
        got = model.eval()(torch.from_numpy(stored["ids"].astype(np.int64)[None]), use_cache=False).logits[0].numpy()
    want = stored["logits"]
    return {
        "folder": folder.name,
        "difference": float(np.abs(got - want).max() / want.std()),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        print(json.dumps(check(Path(path))), flush=True)
