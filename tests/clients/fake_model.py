"""Serves a model that answers what a client expects: `python fake_model.py --port N --names a b`.

It is the server of the unit tests around a fake that reads its prompt: it calls the tools that it is shown, fills in
the schema that it is held to, and else repeats what was said. Only the protocol is tested with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `unit.serving`, as pytest's `pythonpath` has it

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.app import make_app
from jaxllama_serving.http.connection import Listener, bind
from unit.serving.fakes import BOS, EOS, FIRST_WORD, FakeEngine, FakeLlama, FakeRequest

from jaxllama import SamplingParams
from jaxllama.text.encoding.detokenize import ByteDecoder
from jaxllama.text.messages import for_template, normalized
from jaxllama.text.reasoning import THINK
from jaxllama.text.structured import GrammarSource, quote
from jaxllama.text.tools import HERMES, Tool

_CONTEXT = 200_000


class ByteTokenizer:
    """A token for each byte, so that the prompt's text can be had back from its ids."""

    bos_token_id = None
    eos_token_id = EOS
    vocab_size = FIRST_WORD + 256
    special_tokens: Mapping[str, int] = {"<eos>": EOS}

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - FIRST_WORD]) if token_id >= FIRST_WORD else b""

    def decoder(
        self, *, skip_special: bool = True, prompt_tail: Sequence[int] = (), shown: Sequence[str] = ()
    ) -> ByteDecoder:
        return ByteDecoder(self.token_bytes, prompt_tail=prompt_tail)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        return [*([] if add_bos is False else [BOS]), *(FIRST_WORD + byte for byte in text.encode())]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def encode_rendered(self, rendered: Any) -> list[int]:
        return self.encode(rendered.text, add_bos=False)


class JsonTemplate:
    """Renders a chat as JSON, which the fake reads again."""

    variables = own_variables = frozenset({"tools"})
    has_reasoning = False
    reasoning_tags = THINK
    tool_format = HERMES

    def variant(self, *, with_tools: bool) -> JsonTemplate:
        return self

    def render(self, messages: Sequence[dict[str, Any]], *, tools: Sequence[Tool] = (), **options: Any) -> Any:
        given = for_template(normalized(messages), tools, HERMES, self.variables | {"tool_calls"}, self.variables)
        chat = {"messages": given, "tools": [tool.definition for tool in tools]}
        return SimpleNamespace(text=json.dumps(chat), starts_in_reasoning=None, continued="")


class UncompiledGrammars:
    """Keeps the source of a grammar instead of compiling it: the fake reads from it what it is held to."""

    compiler = SimpleNamespace(literal=quote)

    def compile(self, source: GrammarSource, name: str, starts_in_reasoning: bool | None) -> GrammarSource:
        return source

    def make(self, grammar: GrammarSource | None = None, **bounds: Any) -> GrammarSource | None:
        return grammar


@dataclass
class ReadingEngine(FakeEngine):
    """Answers each prompt with `reply`."""

    held_to: dict[int, GrammarSource | None] = field(default_factory=dict)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: Callable[[Any], None],
        *,
        constraint: GrammarSource | None = None,
        **options: Any,
    ) -> FakeRequest:
        self.held_to[len(self.rows)] = constraint
        return super().submit(prompt_ids, params, on_output, **options)

    def script_of(self, row: FakeRequest) -> list[int]:
        tokenizer = ByteTokenizer()
        text = reply(tokenizer.decode(self.prompts[row.index]), self.held_to[row.index])
        return [*tokenizer.encode(text, add_bos=False), EOS]


class ReadingLlama(FakeLlama):
    """`FakeLlama` whose parts are those above."""

    def __init__(self) -> None:
        super().__init__(())
        self.tokenizer = ByteTokenizer()  # type: ignore[assignment]
        self.chat_template = JsonTemplate()  # type: ignore[assignment]
        self.constraints = UncompiledGrammars()
        self.engine = ReadingEngine(batch=3, delay_s=0.002, max_context=_CONTEXT)
        self.max_context = _CONTEXT
        self.config = SimpleNamespace(vocab_size=ByteTokenizer.vocab_size)


def reply(prompt: str, held_to: GrammarSource | None) -> str:
    """The text that the fake writes: calls of tools, JSON of a schema, or what the last message said."""
    try:
        chat = json.loads(prompt)
        messages, tools = chat["messages"], chat["tools"]
    except (ValueError, TypeError, KeyError):
        return f" and so on, after {prompt[-40:]!r}"
    said = str(messages[-1].get("content") or "")
    has_results = messages[-1]["role"] == "tool"
    if held_to is not None and "call_0" in held_to.rules:
        tools = [tool for tool in tools if f'\\"{tool["function"]["name"]}\\"' in held_to.rules]
    must_call = held_to is not None and held_to.start == "calls"
    if tools and (must_call or not has_results):
        return "\n".join(_call(tool["function"], said) for tool in (tools[:1] if must_call else tools))
    if held_to is not None and "content" in held_to.parts:
        return json.dumps(example(held_to.parts["content"].get("json_schema", {}), said), ensure_ascii=False)
    if has_results:
        results = [message["content"] for message in messages if message["role"] == "tool"]
        return f"The tools said: {', '.join(results)}"
    return f"You said: {said}"


def _call(function: Mapping[str, Any], said: str) -> str:
    call = {"name": function["name"], "arguments": example(function["parameters"], said)}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def example(schema: Any, said: str, root: Any = None) -> Any:
    """A value that the schema allows, with the number or the quoted text of `said` where one fits."""
    root = schema if root is None else root
    if schema is True or not schema:
        return {}
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target[step] if step else target
        return example(target, said, root)
    for keyword in ("const", "default"):
        if keyword in schema:
            return schema[keyword]
    if "enum" in schema:
        return schema["enum"][0]
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            return example(schema[keyword][0], said, root)
    kind = schema.get("type", "object")
    return _EXAMPLES[kind if isinstance(kind, str) else kind[0]](schema, said, root)


def _object(schema: Mapping[str, Any], said: str, root: Any) -> dict[str, Any]:
    if "properties" not in schema:  # any object will do: one with the keys that were asked for
        return dict.fromkeys(re.findall(r"'(\w+)'", said), "some text")
    return {name: example(inner, said, root) for name, inner in schema["properties"].items()}


def _number(schema: Mapping[str, Any], said: str, root: Any) -> int:
    found = re.search(r"\d+", said)
    low, high = schema.get("minimum", 0), schema.get("maximum", 1_000_000)
    return int(min(max(int(found[0]) if found else 3, low), high))


def _text(schema: Mapping[str, Any], said: str, root: Any) -> str:
    quoted = re.search(r"'([^']+)'", said)
    return (quoted[1] if quoted else "some text")[: schema.get("maxLength")]


_EXAMPLES: Mapping[str, Callable[[Any, str, Any], Any]] = {
    "object": _object,
    "array": lambda schema, said, root: (
        [example(schema.get("items", {"type": "string"}), said, root)] * max(1, schema.get("minItems", 1))
    ),
    "integer": _number,
    "number": _number,
    "string": _text,
    "boolean": lambda schema, said, root: True,
    "null": lambda schema, said, root: None,
}


async def serve(port: int, names: Sequence[str]) -> None:
    """Serves until SIGTERM."""
    llama, stop = ReadingLlama(), asyncio.Event()
    config = ServerConfig(model_names=tuple(names), port=port)
    listener = Listener(make_app(llama, config), config)  # type: ignore[arg-type]
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await listener.start(bind(config.host, port))
    await stop.wait()
    await listener.close()
    llama.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--names", nargs="+", required=True)
    options = parser.parse_args()
    asyncio.run(serve(options.port, options.names))


if __name__ == "__main__":
    main()
