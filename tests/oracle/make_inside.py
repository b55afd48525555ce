"""Goldens of what is inside: transformers' hidden states, attention weights and gradients, in float32.

    python tests/oracle/make_inside.py --out tests/golden [--default FOLDER]

Writes inside.npz, of tiny random Llamas, and default_inside.npz, of the default model, which is in FOLDER as `jaxllama
export MODEL FOLDER --dtype float32` writes it. See tests/golden/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tiny_models import TINY_MODELS, random_weights, token_ids
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

MODELS = ("wide_heads_tied", "llama31_like")
TOKENS, TOKEN = 13, 5
DEFAULT_TEXT = "The capital of France is Paris, and the capital of Italy is"
DEFAULT_LAYERS, DEFAULT_POSITIONS = (0, 9, 19, 29), (0, 5, -1)
HIDDEN_LAYERS = (0, 1, 5, 9, 13, 17, 21, 25, 29)


def main() -> None:
    """Runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--default", type=Path)
    args = parser.parse_args()
    write_tiny(args.out)
    if args.default is not None:
        write_default(args.default, args.out)


def write_tiny(out: Path) -> None:
    """inside.npz."""
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


def write_default(folder: Path, out: Path) -> None:
    """default_inside.npz: hidden states of a few positions of some layers, and the attention of a few."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(folder)(DEFAULT_TEXT, return_tensors="pt")["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = model(inputs_embeds=embeddings, output_hidden_states=True, output_attentions=True, use_cache=False)
    token = int(found.logits[0, -1].argmax())
    torch.log_softmax(found.logits[0, -1], dim=-1)[token].backward()
    hidden = np.stack([state[0].detach().numpy() for state in found.hidden_states[:-1]])
    attentions = np.stack([found.attentions[layer][0].detach().numpy() for layer in DEFAULT_LAYERS])
    np.savez_compressed(
        out / "default_inside.npz",
        ids=ids[0].numpy().astype(np.int32),
        token=np.array(token),
        positions=np.arange(ids.shape[1])[list(DEFAULT_POSITIONS)],
        layers=np.array(DEFAULT_LAYERS),
        hidden_layers=np.array(HIDDEN_LAYERS),
        hidden_states=hidden[list(HIDDEN_LAYERS)][:, list(DEFAULT_POSITIONS)],
        attentions=attentions,
        logprobs=torch.log_softmax(found.logits[0], dim=-1).detach().numpy()[:, ::64],
        gradient=embeddings.grad[0].numpy(),
    )


if __name__ == "__main__":
    main()
