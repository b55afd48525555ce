"""Goldens of the default model, from transformers in float32 and the raw tokenizers library.

    python tests/oracle/make_goldens.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out tests/golden

Writes default_logits.npz, default_greedy.json, tokenizer.json. See tests/golden/README.md. Takes about two minutes on
two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import torch
from load_gguf import load_llama, load_tokenizer, metadata
from prompts import (
    GREEDY_CHATS,
    GREEDY_TEXTS,
    LOGIT_POSITIONS,
    LOGIT_PROMPTS,
    NUM_GREEDY_TOKENS,
    tokenizer_corpus,
)
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

NUM_TOP, NUM_COLUMNS = 64, 512
NEAR_TIE = 0.02  # logits; float32 implementations differ by up to 1e-3


def origin(gguf_path: Path) -> dict[str, Any]:
    """Where the numbers come from."""
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "gguf", "numpy")
    }
    digest = hashlib.sha256(gguf_path.read_bytes()).hexdigest()
    return {"file": gguf_path.name, "sha256": digest, "versions": versions}


def logit_goldens(model: LlamaForCausalLM, exact: LlamaForCausalLM, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Per prompt: ids, positions, and of each position's logits the top 64, 512 fixed columns, logsumexp and mean."""
    columns = np.sort(np.random.default_rng(5).choice(model.config.vocab_size, NUM_COLUMNS, replace=False)).astype(
        np.int32
    )
    arrays = {"columns": columns}
    prompt_ids = {name: tokenizer.encode(text).ids for name, text in LOGIT_PROMPTS.items()}
    positions = {
        name: np.linspace(0, len(ids) - 1, LOGIT_POSITIONS[name]).round().astype(np.int32)
        for name, ids in prompt_ids.items()
    }
    error = 0.0
    for name, ids in prompt_ids.items():
        batch = torch.tensor([ids])
        logits = model(batch, use_cache=False).logits[0][positions[name].tolist()]
        error = max(
            error, float((exact(batch, use_cache=False).logits[0][positions[name].tolist()] - logits).abs().max())
        )
        top = torch.topk(logits, NUM_TOP)
        arrays |= {
            f"{name}/ids": np.array(ids, np.int32),
            f"{name}/positions": positions[name],
            f"{name}/top_ids": top.indices.numpy().astype(np.int32),
            f"{name}/top_logits": top.values.numpy(),
            f"{name}/column_logits": logits[:, columns.tolist()].numpy(),
            f"{name}/logsumexp": torch.logsumexp(logits.double(), -1).float().numpy(),
            f"{name}/mean": logits.double().mean(-1).float().numpy(),
        }
    return arrays | {"float64_max_difference": np.array(error)}


def greedy(model: LlamaForCausalLM, prompt_ids: list[int]) -> tuple[list[int], list[float], list[int]]:
    """NUM_GREEDY_TOKENS likeliest tokens, past any end-of-sequence; the top-2 margins and the runners-up."""
    ids, margins, seconds, cache = [], [], [], None
    step = torch.tensor([prompt_ids])
    while len(ids) < NUM_GREEDY_TOKENS:
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, top = out.past_key_values, torch.topk(out.logits[0, -1], 2)
        ids.append(int(top.indices[0]))
        seconds.append(int(top.indices[1]))
        margins.append(float(top.values[0] - top.values[1]))
        step = top.indices[:1][None]
    return ids, margins, seconds


def greedy_golden(model: LlamaForCausalLM, exact: LlamaForCausalLM, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """One prompt's continuation, checked without a cache and in float64."""
    prompt_ids = tokenizer.encode(text).ids
    ids, margins, seconds = greedy(model, prompt_ids)
    teacher = torch.tensor([prompt_ids + ids[:-1]])
    for judge in (model, exact):
        again = judge(teacher, use_cache=False).logits[0, len(prompt_ids) - 1 :].argmax(-1).tolist()
        if again != ids:
            steps = [i for i, (a, b) in enumerate(zip(again, ids, strict=True)) if a != b]
            print(f"WARNING: {text[:40]!r}: {judge.dtype} without a cache disagrees at steps {steps}")
    eos = model.config.eos_token_id
    return {
        "text": text,
        "prompt_ids": prompt_ids,
        "ids": ids,
        "completion": tokenizer.decode(ids, skip_special_tokens=False),
        "eos_at": ids.index(eos) if eos in ids else None,
        "min_margin": round(min(margins), 5),
        "margins": [round(margin, 5) for margin in margins],
        "near_ties": [
            {"step": i, "chosen": ids[i], "second": seconds[i], "margin": round(margin, 5)}
            for i, margin in enumerate(margins)
            if margin < NEAR_TIE
        ],
    }


def render(template: str, messages: list[dict[str, str]]) -> str:
    """The chat template as transformers renders it: blocks trimmed, a generation prompt added."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


def write_json(path: Path, value: Any) -> None:
    """One line per entry, so that a change shows as a small diff."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=True)}" for key, item in value.items())
    path.write_text("{\n" + lines + "\n}\n")


def tokenizer_goldens(path: str, template: str) -> dict[str, Any]:
    """`plain` is ordinary text where nothing spells a special token; `chats` are rendered templates where it does."""
    plain, chat = load_tokenizer(path, with_specials=False), load_tokenizer(path, with_specials=True)
    rendered = {name: render(template, messages) for name, messages in GREEDY_CHATS.items()}
    return {
        f"plain {i}": {"text": text, "ids": plain.encode(text).ids} for i, text in enumerate(tokenizer_corpus())
    } | {
        f"chat {name}": {"messages": GREEDY_CHATS[name], "text": text, "ids": chat.encode(text).ids}
        for name, text in rendered.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(2)
    source = origin(args.gguf)
    template = metadata(gguf.GGUFReader(args.gguf), "tokenizer.chat_template")
    write_json(args.out / "tokenizer.json", {"origin": source} | tokenizer_goldens(str(args.gguf), template))
    tokenizer = load_tokenizer(str(args.gguf), with_specials=True)
    texts = GREEDY_TEXTS | {f"chat_{name}": render(template, messages) for name, messages in GREEDY_CHATS.items()}
    with torch.inference_mode():
        model, exact = load_llama(str(args.gguf)), load_llama(str(args.gguf), torch.float64)
        logits = logit_goldens(model, exact, tokenizer)
        np.savez_compressed(args.out / "default_logits.npz", origin=np.array(json.dumps(source)), **logits)
        runs = {name: greedy_golden(model, exact, tokenizer, text) for name, text in texts.items()}
    write_json(args.out / "default_greedy.json", {"origin": source} | runs)
    print(f"float32 against float64: {float(logits['float64_max_difference']):.2e}")
    for name, run in runs.items():
        print(f"{name}: smallest margin {run['min_margin']}, eos at {run['eos_at']}, near-ties {run['near_ties']}")


if __name__ == "__main__":
    main()
