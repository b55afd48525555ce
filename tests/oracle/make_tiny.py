"""Goldens that need no model file: tiny random Llamas and the sampling filters of transformers.

    python tests/oracle/make_tiny.py --out tests/golden

Writes tiny_models.npz, filters.npz. See tests/golden/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from load_gguf import build_llama
from tiny_models import FAR_POSITION, TINY_MODELS, checksum, random_weights, token_ids
from transformers import LlamaConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

FILTER_ROWS, FILTER_VOCAB, FILTER_PROMPT, FILTER_OUTPUT = 8, 257, 40, 12
EOS_ID = 7


def tiny_goldens() -> dict[str, np.ndarray]:
    """Per model the weights' checksum, and ids, positions and float32 logits of three sequences.

    `near` starts at position 0, `far` at FAR_POSITION; `gaps` jumps from 0 to beyond FAR_POSITION, because rotary
    attention sees only distances and `far` alone cannot tell one scaling of the slow frequencies from another.
    """
    arrays: dict[str, np.ndarray] = {}
    for seed, (name, hf) in enumerate(TINY_MODELS.items()):
        weights = random_weights(hf, seed)
        model = build_llama(LlamaConfig(**hf), weights)
        arrays[f"{name}/sha256"] = np.array(checksum(weights))
        gaps = np.sort(np.random.default_rng(seed).integers(0, FAR_POSITION + 500, 19))
        for kind, positions in (("near", np.arange(29)), ("far", FAR_POSITION + np.arange(21)), ("gaps", gaps)):
            ids = token_ids(hf, seed, len(positions))
            # Without an explicit mask transformers takes jumps in the positions for packed sequences.
            batch = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": np.ones_like(ids)[None]}
            with torch.inference_mode():
                logits = model(
                    **{key: torch.from_numpy(value) for key, value in batch.items()}, use_cache=False
                ).logits[0]
            arrays[f"{name}/{kind}_ids"] = ids.astype(np.int32)
            arrays[f"{name}/{kind}_positions"] = positions.astype(np.int32)
            arrays[f"{name}/{kind}_logits"] = logits.numpy()
    return arrays


def filter_goldens() -> dict[str, np.ndarray]:
    """The processors one at a time and in the order of transformers' generate, over rows of different sharpness."""
    rng = np.random.default_rng(20)
    sharpness = np.linspace(0.5, 6, FILTER_ROWS)[:, None]
    logits = (rng.standard_normal((FILTER_ROWS, FILTER_VOCAB)) * sharpness).astype(np.float32)
    logits[0] = np.float32(0.25)  # a flat row: everything ties
    logits[1, 10:14] = logits[1].max()  # four tokens tie for the first place
    ids = rng.integers(0, FILTER_VOCAB, (FILTER_ROWS, FILTER_PROMPT + FILTER_OUTPUT))
    scores, seen = torch.from_numpy(logits), torch.from_numpy(ids)
    min_new = MinNewTokensLengthLogitsProcessor(FILTER_PROMPT, FILTER_OUTPUT + 1, EOS_ID, device="cpu")
    cases = {
        "temperature_0.7": [TemperatureLogitsWarper(0.7)],
        "temperature_1.6": [TemperatureLogitsWarper(1.6)],
        "top_k_1": [TopKLogitsWarper(1)],
        "top_k_20": [TopKLogitsWarper(20)],
        "top_k_300": [TopKLogitsWarper(300)],
        "top_p_0.05": [TopPLogitsWarper(0.05)],
        "top_p_0.9": [TopPLogitsWarper(0.9)],
        "min_p_0.02": [MinPLogitsWarper(0.02)],
        "min_p_1.0": [MinPLogitsWarper(1.0)],
        "repetition_penalty_1.3": [RepetitionPenaltyLogitsProcessor(1.3)],
        "repetition_penalty_0.8": [RepetitionPenaltyLogitsProcessor(0.8)],
        "min_tokens": [min_new],
        "all": [
            RepetitionPenaltyLogitsProcessor(1.2),
            min_new,
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.05),
        ],
    }
    arrays = {name: LogitsProcessorList(steps)(seen, scores.clone()).numpy() for name, steps in cases.items()}
    return arrays | {
        "logits": logits,
        "ids": ids.astype(np.int32),
        "num_prompt": np.array(FILTER_PROMPT),
        "eos": np.array(EOS_ID),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(2)
    np.savez_compressed(out / "tiny_models.npz", **tiny_goldens())
    np.savez_compressed(out / "filters.npz", **filter_goldens())


if __name__ == "__main__":
    main()
