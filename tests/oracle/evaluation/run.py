"""Runs `items`' tasks, or some, with one of lm-eval's models and writes what it answered, item by item, into a file.

    python tests/oracle/evaluation/run.py hf pretrained=FOLDER,dtype=float32 --out tests/golden/evaluation.json

`hf` is transformers, whose answers are the golden: FOLDER is `jaxllama export MODEL FOLDER --dtype float32`. `jaxllama`
is ours in process, `local-completions` ours through a server.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from items import write_tasks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main() -> None:
    """Runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("model_args")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tasks", nargs="*", help="these alone; the file keeps what it has of the others")
    args = parser.parse_args()
    if args.model == "jaxllama":
        from jaxllama.llama.evaluation import register

        register()
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in write_tasks(Path(folder)) if args.tasks is None or name in args.tasks]
        found = simple_evaluate(
            model=args.model,
            model_args=args.model_args,
            tasks=names,
            batch_size=args.batch_size,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch", "jaxllama")}
    result: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"metrics": {}}
    result["origin"] = {"model": args.model, "versions": {name: found for name, found in versions.items() if found}}
    for name in names:
        result["metrics"] |= {
            f"{name} {key}": float(value)
            for key, value in found["results"][name].items()
            if isinstance(value, float) and "stderr" not in key
        }
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        if name == "activities":
            result["logprobs"] = [[round(float(one[0][0]), 5) for one in sample["resps"]] for sample in samples]
            result["is_greedy"] = [[bool(one[0][1]) for one in sample["resps"]] for sample in samples]
        else:
            result[name] = [sample["resps"][0][0] for sample in samples]
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(result["metrics"])


def version(name: str) -> str | None:
    """That of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
