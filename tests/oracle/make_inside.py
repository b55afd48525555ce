"""Goldens of what is inside: transformers' hidden states, attention weights and gradients of tiny random Llamas.

    python tests/oracle/make_inside.py --out tests/golden

Writes inside.npz. See tests/golden/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tiny_models import TINY_MODELS, random_weights, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

MODELS = ("wide_heads_tied", "llama31_like")
TOKENS, TOKEN = 13, 5


def main() -> None:
    """Runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    arrays: dict[str, np.ndarray] = {}
    for seed, (name, hf) in enumerate(TINY_MODELS.items()):
        if name not in MODELS:
            continue
        # Only this implementation gives the attention weights.
        model = LlamaForCausalLM(LlamaConfig(**hf, attn_implementation="eager")).to(torch.float32).eval()
        state = {key: torch.from_numpy(np.array(values)) for key, values in random_weights(hf, seed).items()}
        if hf["tie_word_embeddings"]:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True)
        ids = token_ids(hf, seed, TOKENS)
        embeddings = model.get_input_embeddings()(torch.from_numpy(ids[None])).detach().requires_grad_()
        found = model(inputs_embeds=embeddings, output_hidden_states=True, output_attentions=True, use_cache=False)
        found.logits[0, -1, TOKEN].backward()
        # The last hidden state is normalised already; the others enter the layers.
        hidden = [state[0].detach().numpy() for state in found.hidden_states[:-1]]
        arrays |= {
            f"{name}/ids": ids.astype(np.int32),
            f"{name}/token": np.array(TOKEN),
            f"{name}/hidden_states": np.stack(hidden),
            f"{name}/attentions": np.stack([weights[0].detach().numpy() for weights in found.attentions]),
            f"{name}/logits": found.logits[0].detach().numpy(),
            f"{name}/gradient": embeddings.grad[0].numpy(),
        }
    np.savez_compressed(out / "inside.npz", **arrays)


if __name__ == "__main__":
    main()
