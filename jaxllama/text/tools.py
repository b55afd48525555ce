"""Tools: how models are told of them, how their calls and results are written, and grammars that force a call.

A template that knows `tools` shows them itself. For the others, R1's among them, the tools become part of the system
text, and calls and results part of ordinary messages, written as the format says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxllama.errors import GrammarError, RequestError
from jaxllama.text.structured import GrammarCompiler, GrammarSource, check_schema, json_part

_MAX_CALLS = 16
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments, an object.

    Raises: RequestError (GrammarError for the schema).
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RequestError(f"a tool's name must be 1 to 64 letters, digits, _ or -, got {self.name!r:.80}", "tools")
        check_schema(self.parameters, "parameters")
        if self.parameters and self.parameters.get("type", "object") != "object":
            raise GrammarError('parameters: the schema of a function\'s arguments must have "type": "object"', "tools")

    @property
    def definition(self) -> dict[str, Any]:
        """As templates and models know it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments, which are always an object."""
        return {**self.parameters, "type": "object"}


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls: `before`, the calls with `between` them, `after`.

    A call is its head, the arguments, `tail`; `head` holds NAME where the name goes. `opening` is the text that begins
    calls; None: calls are whole messages that begin with a brace. `results` is what goes around all results, `result`
    what goes around each. `marks` are the special tokens that calls are written with: decoders show them. `call_id` is
    what a call's id must match, where templates refuse others. `tools_in_message`: templates look for the tools in the
    system message.
    """

    name: str
    opening: str | None
    head: str
    tail: str
    before: str = ""
    between: str = ""
    after: str = ""
    results: tuple[str, str] = ("", "")
    result: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>")
    marks: tuple[str, ...] = ()
    call_id: str | None = None
    tools_in_message: bool = False

    def id_of(self, call_id: str) -> str:
        """A call's id as templates accept it: the same for the same, also for a call and its result."""
        if self.call_id is None or re.fullmatch(self.call_id, call_id):
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    def head_of(self, name: str) -> str:
        """What comes before the arguments of a call of `name`."""
        return self.head.replace("NAME", name)

    def write_calls(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls (name, arguments as JSON) as the model would write them."""
        written = self.between.join(self.head_of(name) + arguments + self.tail for name, arguments in calls)
        return self.before + written + self.after

    def write_results(self, results: Sequence[str]) -> str:
        """What tools answered."""
        (start, end), (before, after) = self.results, self.result
        return start + "\n".join(before + text + after for text in results) + end

    def describe(self, tools: Sequence[Tool]) -> str:
        """The part of the system text that tells of the tools."""
        example = self.write_calls([("NAME", "{…}")])
        listed = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
        return (
            "You can call functions. Each line describes one, its parameters as a JSON schema:\n"
            f"{listed}\n"
            "To call a function, write its name for NAME and its arguments, a JSON object, in exactly this form:\n"
            f"{example}\n"
            "The results come in the next message. Answer directly when no function is needed."
        )


HERMES = ToolFormat(
    name="hermes",
    opening="<tool_call>",
    head='<tool_call>\n{"name": "NAME", "arguments": ',
    tail="}\n</tool_call>",
    between="\n",
)
LLAMA3 = ToolFormat(
    name="llama3",
    opening=None,
    head='{"name": "NAME", "parameters": ',
    tail="}",
    between="; ",
)
R1 = ToolFormat(
    name="r1",
    opening="<｜tool▁calls▁begin｜>",
    head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
    tail="\n```<｜tool▁call▁end｜>",
    before="<｜tool▁calls▁begin｜>",
    between="\n",
    after="<｜tool▁calls▁end｜>",
    results=("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    result=("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
# Mistral's first form: v1 to v3 and v7 of its tokenizers. Ids that its models write beside the arguments are dropped.
MISTRAL = ToolFormat(
    name="mistral",
    opening="[TOOL_CALLS]",
    head='{"name": "NAME", "arguments": ',
    tail="}",
    before="[TOOL_CALLS][",
    between=", ",
    after="]",
    result=("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    call_id=r"[a-zA-Z0-9]{9}",
)
# Its later form, v11 (with an id, which is read and dropped) and v13: Small 3.2, Devstral, Magistral.
MISTRAL_ARGS = replace(
    MISTRAL, name="mistral-args", head="[TOOL_CALLS]NAME[ARGS]", tail="", before="", between="", after=""
)
GRANITE = ToolFormat(
    name="granite",
    opening="<|tool_call|>",
    head='{"name": "NAME", "arguments": ',
    tail="}",
    before="<|tool_call|>[",
    between=", ",
    after="]",
    marks=("<|tool_call|>",),
)
# Phi-4-mini's.
PHI = replace(
    GRANITE,
    name="phi",
    after="]<|/tool_call|>",
    result=("<|tool_response|>", "<|/tool_response|>"),
    marks=("<|tool_call|>", "<|/tool_call|>"),
    tools_in_message=True,
)
TOOL_FORMATS = {
    tool_format.name: tool_format for tool_format in (HERMES, LLAMA3, R1, MISTRAL, MISTRAL_ARGS, GRANITE, PHI)
}


def choose_format(template: str) -> ToolFormat:
    """The format that a chat template's source speaks of; Hermes' where it speaks of none."""
    if "<｜tool▁calls▁begin｜>" in template or "<｜Assistant｜>" in template:
        return R1
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<|start_of_role|>" in template and "<tool_call>" not in template:
        return GRANITE
    if "<|/tool|>" in template or "functools[" in template:
        return PHI
    if "<tool_call>" not in template and "<|start_header_id|>" in template:
        return LLAMA3
    return HERMES


def write_out(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """The messages without anything that a template must know of tools: all of it is text.

    The tools are told of in the system message, results come as a user's message. Contents must be texts or None.
    """
    written: list[dict[str, Any]] = []
    if tools:
        written.append({"role": "system", "content": tool_format.describe(tools)})
    results: list[str] = []
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "tool":
            results.append(content)
            continue
        if results:
            written.append({"role": "user", "content": tool_format.write_results(results)})
        if message["role"] in ("system", "developer") and tools:
            written[0]["content"] = f"{content}\n\n{written[0]['content']}"
        elif message["role"] == "user" and results:
            # Some templates refuse two messages of a user in a row.
            written[-1]["content"] += f"\n{content}"
        else:
            calls = [(c["function"]["name"], _as_json(c["function"])) for c in message.get("tool_calls") or ()]
            if calls:
                content += ("\n" if content else "") + tool_format.write_calls(calls)
            others = {key: value for key, value in message.items() if key not in ("content", "tool_calls")}
            written.append({**others, "content": content})
        results = []
    if results:
        written.append({"role": "user", "content": tool_format.write_results(results)})
    return written


def _as_json(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def as_templates_expect(
    messages: Sequence[Mapping[str, Any]], tool_format: ToolFormat, *, knows_calls: bool = True
) -> list[dict[str, Any]]:
    """The messages for templates that know tools: arguments of calls are objects, not JSON, and ids have their form.

    Without `knows_calls` the template shows tools and their results, but of an assistant's message the text alone:
    calls become part of that.
    """
    found = []
    for message in map(dict, messages):
        calls = message.get("tool_calls")
        if calls and knows_calls:
            message["tool_calls"] = [_parsed_call(call, tool_format) for call in calls]
        elif calls:
            written = tool_format.write_calls([(c["function"]["name"], _as_json(c["function"])) for c in calls])
            content = message.get("content") or ""
            message["content"] = f"{content}\n{written}" if content else written
            del message["tool_calls"]
        if isinstance(call_id := message.get("tool_call_id"), str):
            message["tool_call_id"] = tool_format.id_of(call_id)
        found.append(message)
    return found


def in_system_message(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages for templates that look for tools, as JSON, in the system message; there is one afterwards."""
    found = [dict(message) for message in messages]
    if not found or found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
    functions = [tool.definition["function"] for tool in tools]
    found[0]["tools"] = json.dumps(functions, ensure_ascii=False)
    return found


def _parsed_call(call: Mapping[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (TypeError, ValueError):
        arguments = function["arguments"]
    parsed = {**call, "function": {**function, "arguments": arguments}}
    return {**parsed, "id": tool_format.id_of(call["id"])} if isinstance(call.get("id"), str) else parsed


def calls_grammar(
    tools: Sequence[Tool], tool_format: ToolFormat, compiler: GrammarCompiler, *, parallel: bool
) -> GrammarSource:
    """Nothing but calls of `tools`, one or with `parallel` up to 16, whose arguments fit their schemas."""
    return _source(tools, tool_format, compiler, "calls", parallel=parallel)


def auto_grammar(
    tools: Sequence[Tool],
    tool_format: ToolFormat,
    compiler: GrammarCompiler,
    *,
    parallel: bool,
    content: GrammarSource | None = None,
) -> GrammarSource:
    """Text (or `content`), or calls; once the text that begins a call has come, what follows is a call that fits."""
    if content is not None:
        calls = calls_grammar(tools, tool_format, compiler, parallel=parallel)
        return GrammarSource(
            f"({calls.start}) | ({content.start})",
            f"{calls.rules}\n{content.rules}",
            {**calls.parts, **content.parts},
        )
    opening = tool_format.opening
    if opening is None:
        return _source(tools, tool_format, compiler, "calls | FREE", r"FREE: /\s*([^{\s](?s:.*))?/", parallel=parallel)
    literal = compiler.literal(opening)
    if literal.startswith("<["):
        start, free = f"FREE | FREE {literal} rest", "FREE: /(?s:.*)/"
    else:
        escaped = re.escape(opening).replace("/", r"\/")
        free = f"FREE: ~/(?s:.*){escaped}(?s:.*)/\nlead[suffix={literal}]: /(?s:.*)/"
        start = "FREE | lead rest"
    return _source(tools, tool_format, compiler, start, free, parallel=parallel)


def _source(
    tools: Sequence[Tool],
    tool_format: ToolFormat,
    compiler: GrammarCompiler,
    start: str,
    rules: str = "",
    *,
    parallel: bool,
) -> GrammarSource:
    literal, f = compiler.literal, tool_format
    names, heads = range(len(tools)), [f.head_of(tool.name) for tool in tools]
    more = f"({literal(f.between)} call){{0,{_MAX_CALLS - 1}}}" if parallel else ""
    ending = f"{more} {literal(f.after)}"
    lines = [
        rules,
        f"calls: {literal(f.before)} call {ending}",
        "call: " + " | ".join(f"call_{i}" for i in names),
        *(f"call_{i}: {literal(head)} {_rest(f, i, compiler)}" for i, head in enumerate(heads)),
    ]
    if f.opening is not None:
        # After the opening, which the text before it has taken with it.
        lines += [
            f"rest: first {ending}",
            "first: " + " | ".join(f"first_{i}" for i in names),
            *(
                f"first_{i}: {literal((f.before + head).removeprefix(f.opening))} {_rest(f, i, compiler)}"
                for i, head in enumerate(heads)
            ),
        ]
    parts = {f"arguments_{i}": json_part(tool.schema) for i, tool in enumerate(tools)}
    return GrammarSource(start, "\n".join(lines), parts)


def _rest(tool_format: ToolFormat, index: int, compiler: GrammarCompiler) -> str:
    return f"@arguments_{index} {compiler.literal(tool_format.tail)}"
