"""Goldens of tiny models of every family, from transformers in float32.

    python tests/oracle/make_families.py --out tests/golden

Writes families.npz. See tests/golden/README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tiny_families import TINY_FAMILIES
from tiny_models import checksum, draw_weights, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

NUM_TOKENS, NUM_GREEDY = 41, 12


def golden(name: str, hf: dict, seed: int) -> dict[str, np.ndarray]:
    """The tensors' shapes, the weights' checksum, the logits of a sequence, and greedy tokens after it."""
    config = AutoConfig.for_model(**hf)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    tied = {"lm_head.weight"} if hf["tie_word_embeddings"] else set()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}
    weights = draw_weights(shapes, seed)
    state = {key: torch.from_numpy(value.copy()) for key, value in weights.items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    arrays = {
        f"{name}/shapes": np.array(json.dumps(shapes)),
        f"{name}/sha256": np.array(checksum(weights)),
    }
    sequence = token_ids(hf, seed, NUM_TOKENS)
    with torch.inference_mode():
        out = model(torch.from_numpy(sequence[None]), use_cache=False)
    arrays[f"{name}/near_ids"] = sequence.astype(np.int32)
    arrays[f"{name}/near_logits"] = out.logits[0].numpy()
    ids = sequence.tolist()
    for _ in range(NUM_GREEDY):
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    arrays[f"{name}/greedy"] = np.array(ids[-NUM_GREEDY:], np.int32)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    arrays: dict[str, np.ndarray] = {}
    for seed, (name, hf) in enumerate(TINY_FAMILIES.items(), start=100):
        arrays |= golden(name, hf, seed)
    np.savez_compressed(out / "families.npz", **arrays)


if __name__ == "__main__":
    main()
