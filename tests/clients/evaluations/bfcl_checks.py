"""The tool schemas of the Berkeley Function Calling Leaderboard through `tool_choice: required`.

Only the package's data are installed. Grammars hold the default model to the schemas, jsonschema checks what it wrote.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "live_simple",
    "live_multiple",
    "simple_java",
    "simple_javascript",
)
NUM_EACH = 4
# The names that the leaderboard gives to JSON schema's types.
TYPES = {"dict": "object", "HashMap": "object", "float": "number", "tuple": "array"}


def schema_of(node: Any) -> Any:
    """A JSON schema from the leaderboard's notation, as its own handlers convert it, with short texts and lists."""
    if isinstance(node, list):
        return [schema_of(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: schema_of(value) for key, value in node.items() if key not in ("default", "optional", "format")}
    if isinstance(node.get("type"), str):
        kind = TYPES.get(node["type"], node["type"])
        kind = kind if kind in ("object", "number", "integer", "boolean", "array", "null") else "string"
        found["type"] = kind
        # A model of 135 million parameters would fill its budget with one string.
        if kind == "string" and "enum" not in found:
            found["maxLength"] = 16
        if kind == "array":
            found |= {"maxItems": 2, "items": found.get("items", {"type": "string", "maxLength": 16})}
        if kind == "object":
            found.setdefault("properties", {})
            found["additionalProperties"] = False
        if kind in ("integer", "number"):
            found |= {"minimum": -9999, "maximum": 9999} | ({"type": "integer"} if kind == "number" else {})
    return found


def cases() -> list[Any]:
    """The first few entries of each category."""
    spec = importlib.util.find_spec("bfcl_eval")
    assert spec is not None
    folder = Path(spec.origin or "").parent / "data"
    found = []
    for category in CATEGORIES:
        lines = (folder / f"BFCL_v4_{category}.json").read_text().splitlines()[:NUM_EACH]
        found += [pytest.param(json.loads(line), id=json.loads(line)["id"]) for line in lines]
    return found


@pytest.fixture(scope="session")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=110) as found:
        yield found


@pytest.mark.parametrize("case", cases())
def check_a_call_fits_its_schema(client, case):
    tools, schemas = [], {}
    for function in case["function"]:
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", function["name"])[:64]
        schemas[name] = schema_of(function["parameters"])
        described = {"name": name, "description": function["description"][:1000], "parameters": schemas[name]}
        tools.append({"type": "function", "function": described})
    answer = client.chat.completions.create(
        model="default",
        messages=case["question"][0],
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=700,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
