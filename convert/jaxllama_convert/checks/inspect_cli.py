"""`jaxllama inspect PLACE [--json]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from jaxllama.weights.places import MODEL_HELP

if TYPE_CHECKING:
    from jaxllama_convert.checks.inspect import Inspection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jaxllama inspect` to a (sub)parser."""
    parser.description = (
        "Says what a model is and what it can do, from headers and texts: no weights are read or downloaded. Exit code "
        "0 when it can be loaded, 1 when it would be refused (all reasons are said), 2 when there is no model."
    )
    parser.add_argument("place", metavar="PLACE", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Looks and prints. What cannot be reached is raised."""
    # Here, so that `jaxllama --help` does not wait for jax.
    from jaxllama_convert.checks.inspect import inspect

    found = inspect(args.place)
    print(json.dumps(dataclasses.asdict(found), indent=2) if args.json else as_text(found))
    return 1 if found.problems else 0


def as_text(found: Inspection) -> str:
    """A line for each thing that is known."""
    kinds = {"jaxllama": "a jaxllama checkpoint", "safetensors": "Hugging Face safetensors", "gguf": "GGUF"}
    lines: list[tuple[str, Any]] = [("place", found.place), ("kind", kinds[found.kind])]
    lines.append(("architecture", found.architecture or "unknown"))
    if found.num_params is not None:
        lines.append(("parameters", f"{found.num_params:,}"))
    if found.num_bytes is not None:
        lines.append(("bytes", f"{found.num_bytes:,}"))
    parts = [f"{name} {entry['tensors']} tensors, {entry['bytes']:,} bytes" for name, entry in found.dtypes.items()]
    lines += [("stored as", part) for part in parts]
    lines.append(("quantisation", found.quantization or "none"))
    if found.model:
        lines.append(("model", _pairs(found.model)))
        lines.append(("rope", _pairs(found.rope)))
    lines.append(("generation", _pairs(found.generation) or "no defaults"))
    lines.append(("tokenizer", _pairs(found.tokenizer) if found.tokenizer else "none"))
    lines.append(("chat template", _pairs(found.chat_template) if found.chat_template else "none"))
    lines += [("warning", text) for text in found.warnings]
    lines += [("refused", text) for text in found.problems]
    return "\n".join(f"{name + ':':<15}{value}" for name, value in lines)


def _pairs(values: dict[str, Any]) -> str:
    def said(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            return " ".join(map(str, value)) or "none"
        return str(value)

    return ", ".join(f"{name.replace('_', ' ')} {said(value)}" for name, value in values.items())
