"""Adapters as PEFT writes them, and the logits of the models that PEFT merges them into, in float32.

    python tests/oracle/make_adapters.py --out tests/golden

Writes adapters/CASE/ and adapters.npz. The bases are tiny models whose weights a rule makes. See the README there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_families import TINY_FAMILIES
from tiny_models import TINY_MODELS, checksum, draw_weights, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

NUM_TOKENS = 29
NEW_TOKENS = 3
_PATTERNS = {"rank_pattern": {"layers.1.self_attn.v_proj": 6}, "alpha_pattern": {".*1.*q_proj": 3}}

# By case: the base, what LoraConfig gets, and what else is done to the model.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("tinyllama_like", {"target_modules": ["q_proj", "v_proj", "down_proj"], **_PATTERNS}),
    "rslora_regex": ("tinyllama_like", {
        "target_modules": r".*\.(0|1)\.(self_attn\.k_proj|mlp\.(gate|up)_proj)", "use_rslora": True,
        "exclude_modules": r".*0\.mlp\.up_proj"}),
    "dora": ("tinyllama_like", {"target_modules": "all-linear", "use_dora": True}),
    "modules_to_save": ("tinyllama_like", {
        "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "post_attention_layernorm"]}),
    "resized": ("tinyllama_like", {"target_modules": ["q_proj"]}),
    "resized_tied": ("wide_heads_tied", {"target_modules": ["q_proj"]}),
    "embedding": ("tinyllama_like", {"target_modules": ["embed_tokens", "lm_head", "up_proj"]}),
    "embedding_dora": ("tinyllama_like", {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "embedding_tied": ("wide_heads_tied", {"target_modules": ["embed_tokens"]}),
    "saved_tied": ("wide_heads_tied", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
    "biased": ("biased", {"target_modules": ["q_proj", "down_proj"], "bias": "all", "lora_bias": True}),
    "fused": ("phi3", {
        "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "layers_to_transform": [1], "use_dora": True}),
    "second": ("tinyllama_like", {"target_modules": ["v_proj", "gate_proj"], "use_dora": True}),
}  # fmt: skip


def base(name: str) -> tuple[Any, dict[str, Any]]:
    """The tiny model in float32, its weights by the rule, and its config."""
    hf = (TINY_MODELS | TINY_FAMILIES)[name]
    config = AutoConfig.for_model(**hf)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    tied = {"lm_head.weight"} if hf["tie_word_embeddings"] else set()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}
    weights = draw_weights(shapes, 0)
    state = {key: torch.from_numpy(value.copy()) for key, value in weights.items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    return model, hf | {"sha256": checksum(weights), "shapes": shapes}


def train(model: Any, seed: int) -> None:
    """What training would have done: every tensor of the adapter gets values."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if "lora_A" in name or "lora_embedding_A" in name:
            tensor.data.copy_(noise / 4)
        elif "lora_B" in name or "lora_embedding_B" in name:
            tensor.data.copy_(noise / 2)
        elif "magnitude" in name:
            tensor.data.mul_(1 + noise / 4)
        elif "modules_to_save" in name or name.endswith(".bias"):
            tensor.data.add_(noise / 4)


def make(name: str, seed: int, out: Path) -> dict[str, np.ndarray]:
    """Writes the adapter. Returns the logits of its base with it, and the base's checksum."""
    base_name, more = CASES[name]
    model, hf = base(base_name)
    if name.startswith("resized"):
        torch.manual_seed(seed)
        model.resize_token_embeddings(hf["vocab_size"] + NEW_TOKENS, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **more))
    train(adapted, seed)
    if name.startswith("resized"):
        embedding = adapted.get_input_embeddings().weight
        embedding.data.add_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed)) / 4)
    shutil.rmtree(out / "adapters" / name, ignore_errors=True)
    adapted.save_pretrained(out / "adapters" / name, save_embedding_layers=name.startswith("resized") or "auto")
    (out / "adapters" / name / "README.md").unlink(missing_ok=True)
    ids = token_ids({"vocab_size": hf["vocab_size"] + NEW_TOKENS * name.startswith("resized")}, seed, NUM_TOKENS)
    arrays = {f"{name}/base": np.array(base_name), f"{name}/base_sha256": np.array(hf["sha256"])}
    arrays[f"{name}/shapes"] = np.array(json.dumps(hf["shapes"]))
    arrays[f"{name}/ids"] = ids.astype(np.int32)
    # Loaded again, as a user would: what is not in the files is not in the golden.
    model, _ = base(base_name)
    if name.startswith("resized"):
        model.resize_token_embeddings(hf["vocab_size"] + NEW_TOKENS, mean_resizing=False)
    merged = PeftModel.from_pretrained(model, out / "adapters" / name).merge_and_unload()
    arrays[f"{name}/logits"] = logits(merged, ids)
    unmerged = logits(adapted, ids)
    print(name, "merged - unmerged:", np.abs(arrays[f"{name}/logits"] - unmerged).max() / unmerged.std())
    return arrays


def in_order(first: str, second: str, out: Path) -> dict[str, np.ndarray]:
    """The second adapter on the model that the first was merged into."""
    model, hf = base(CASES[first][0])
    ids = token_ids(hf, 99, NUM_TOKENS)
    for name in (first, second):
        model = PeftModel.from_pretrained(model, out / "adapters" / name).merge_and_unload()
    return {"in_order/names": np.array([first, second]), "in_order/ids": ids.astype(np.int32),
            "in_order/logits": logits(model, ids)}  # fmt: skip


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Float32 `[T, V]`."""
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(ids[None].astype(np.int64)), use_cache=False).logits[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    arrays: dict[str, np.ndarray] = {}
    for seed, name in enumerate(CASES):
        arrays |= make(name, seed, out)
    arrays |= in_order("plain", "second", out)
    origin = {"peft": peft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    arrays["origin"] = np.array(json.dumps(origin))
    np.savez_compressed(out / "adapters.npz", **arrays)


if __name__ == "__main__":
    main()
