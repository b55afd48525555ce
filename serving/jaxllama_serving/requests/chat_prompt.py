"""What forms a chat's answers besides sampling: the rendered prompt, grammars, tools and the bounds of reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxllama import Structured
from jaxllama.text.constraint import OutputConstraint
from jaxllama.text.structured import GrammarSource
from jaxllama.text.tool_parsing import LiveParser, LooseParser, ToolParser
from jaxllama.text.tools import (
    TOOL_FORMATS,
    Tool,
    ToolFormat,
    auto_grammar,
    calls_grammar,
    choose_format,
    with_parsed_arguments,
    write_out,
)
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.protocol.chat import ChatMessage, ChatRequest
from jaxllama_serving.protocol.errors import invalid

if TYPE_CHECKING:
    from jaxllama import ChatTemplate, Llama

EFFORT_BUDGETS: Mapping[str, int | None] = {"low": 1024, "medium": 8192, "high": None}
"""Tokens of reasoning for models whose template knows no efforts."""


@dataclass(frozen=True)
class Tools:
    """The tools of one request. `is_held` says that a grammar holds the calls to their schemas as they are written."""

    tools: tuple[Tool, ...]
    format: ToolFormat
    must_call: bool
    is_held: bool

    def parser(self) -> ToolParser:
        """Returns what finds the calls of one answer."""
        names = [tool.name for tool in self.tools]
        if self.is_held:
            return LiveParser(self.format, names, must_call=self.must_call)
        return LooseParser(self.format, names)


@dataclass(frozen=True)
class Shape:
    """`starts_in_reasoning` is None when the output is not to be split; it may continue the prompt's last message."""

    prompt_ids: list[int]
    starts_in_reasoning: bool | None
    continues: bool
    tools: Tools | None
    constraints: tuple[OutputConstraint | None, ...]


def shape_chat(llama: Llama, config: ServerConfig, request: ChatRequest, num_choices: int) -> Shape:
    """Returns the prompt of `request` and what holds its answers in form, one constraint a choice.

    Raises: ApiError (400), RequestError, ChatTemplateError.
    """
    template = template_of(llama)
    effort = _effort(request, template)
    offered = tuple(map(_tool, request.offered_tools))
    content = _content(request)
    tools = None
    if offered:
        is_held = _holds_calls(request, offered) or content is not None
        tools = Tools(offered, _format(config, template), request.forces_tools, is_held)
    tools_source, name = _tools_source(llama, request, tools, content)
    close, variables = _reasoning_variables(request, template, effort)
    prompt_ids, rendered = render_chat(
        llama,
        config,
        request.messages,
        shown_tools=[_tool(spec) for spec in request.tools] if tools is not None else [],
        continue_last=request.continues,
        add_generation_prompt=request.add_generation_prompt is not False,
        close_reasoning=close,
        variables=variables,
    )
    starts, source = rendered.starts_in_reasoning, tools_source or content
    grammar = llama.constraints.compile(source, name, starts) if source is not None else None
    budget = request.thinking_budget
    if budget is None and effort is not None and "reasoning_effort" not in template.variables:
        budget = EFFORT_BUDGETS.get(effort)
    continues = request.continues and bool(rendered.continued)
    constraints: tuple[OutputConstraint | None, ...] = (None,) * num_choices
    if grammar is not None or budget is not None:
        begun = rendered.continued if continues and starts is None else ""
        constraints = tuple(
            llama.constraints.make(
                grammar,
                starts_in_reasoning=starts,
                thinking_budget=budget,
                min_tokens=request.min_tokens,
                begun=begun,
            )
            for _ in range(num_choices)
        )
    return Shape(prompt_ids, starts, continues, tools, constraints)


def template_of(llama: Llama) -> ChatTemplate:
    """Raises: ApiError, status 400, for a model that cannot chat."""
    if llama.chat_template is None or llama.tokenizer is None:
        raise invalid("This model has no chat template, so it cannot chat.", "messages")
    return llama.chat_template


def render_chat(
    llama: Llama,
    config: ServerConfig,
    messages: Sequence[ChatMessage],
    *,
    shown_tools: Sequence[Tool] = (),
    **options: Any,
) -> tuple[list[int], Any]:
    """Returns the prompt's ids, and the `RenderedChat` they are of. `options` are those of `ChatTemplate.render`.

    Raises: ApiError (400), RequestError, ChatTemplateError.
    """
    template = template_of(llama)
    assert llama.tokenizer is not None
    plain = template_messages(messages)
    if "tools" in template.variables:
        plain = with_parsed_arguments(plain)
        if shown_tools:
            shown = {"tools": [tool.definition for tool in shown_tools]}
            options["variables"] = {**options.get("variables", {}), **shown}
    elif shown_tools or any(message["role"] == "tool" or message.get("tool_calls") for message in plain):
        plain = write_out(plain, shown_tools, _format(config, template))
    rendered = template.render(plain, **options)
    return llama.tokenizer.encode_rendered(rendered), rendered


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Returns the messages as templates want them: text content, `developer` as `system`, the system message first.

    Raises: ApiError for a second system message.
    """
    system: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        if message.role in ("system", "developer"):
            if system:
                raise invalid(
                    f"messages[{i}] is a second system message, at most one is allowed", f"messages[{i}].role"
                )
            system.append({"role": "system", "content": message.text})
        elif message.role == "tool":
            rest.append({"role": "tool", "content": message.text, "tool_call_id": message.tool_call_id})
        else:
            plain: dict[str, Any] = {"role": message.role, "content": message.text}
            if message.reasoning_content and message is messages[-1]:
                plain["reasoning_content"] = message.reasoning_content
            if message.tool_calls:
                calls = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
                plain |= {"content": message.text or None, "tool_calls": calls}
            rest.append(plain)
    return system + rest


def _effort(request: ChatRequest, template: ChatTemplate) -> str | None:
    """The effort that the request asks for under any of its names: "none", "low", "medium", "high" or None.

    Raises: ApiError for names that disagree, and for one that this model cannot follow.
    """
    kwargs, reasoning = request.chat_template_kwargs, request.reasoning
    flags = {
        "chat_template_kwargs.enable_thinking": kwargs.enable_thinking if kwargs is not None else None,
        "chat_template_kwargs.thinking": kwargs.thinking if kwargs is not None else None,
        "reasoning.enabled": reasoning.enabled if reasoning is not None else None,
    }
    effort = request.reasoning_effort or (reasoning.effort if reasoning is not None else None)
    if effort is not None:
        flags["reasoning_effort"] = effort != "none"
    given = {name: flag for name, flag in flags.items() if flag is not None}
    if len(set(given.values())) > 1:
        raise invalid(f"{' and '.join(given)} disagree on whether to reason.", next(iter(given)))
    wanted = next((name for name, flag in given.items() if flag), None)
    wanted = "thinking_budget" if request.thinking_budget is not None else wanted
    if wanted is not None and not template.has_reasoning:
        raise invalid(f"{wanted}: this model does not reason.", wanted)
    return "none" if given and not any(given.values()) else effort


def _reasoning_variables(
    request: ChatRequest, template: ChatTemplate, effort: str | None
) -> tuple[bool, dict[str, Any]]:
    """Whether to close the reasoning in the prompt, and the template's own variables where it has some."""
    known = [name for name in ("enable_thinking", "thinking") if name in template.variables]
    is_on = effort is not None or (request.reasoning is not None and request.reasoning.enabled is True)
    is_on = is_on or request.chat_template_kwargs is not None
    variables: dict[str, Any] = {name: effort != "none" for name in known if is_on}
    if effort not in (None, "none") and "reasoning_effort" in template.variables:
        variables["reasoning_effort"] = effort
    return effort == "none" and not known and not request.continues, variables


def _format(config: ServerConfig, template: ChatTemplate) -> ToolFormat:
    return choose_format(template.source) if config.tool_parser is None else TOOL_FORMATS[config.tool_parser]


def _tool(spec: Any) -> Tool:
    function = spec.function
    return Tool(function.name, function.description, function.parameters, function.strict)


def _holds_calls(request: ChatRequest, tools: Sequence[Tool]) -> bool:
    return request.forces_tools or any(tool.strict for tool in tools) or not request.parallel_tool_calls


def _content(request: ChatRequest) -> GrammarSource | None:
    """The grammar of an answer that is no call."""
    if request.structured_outputs is not None:
        given = request.structured_outputs
        return Structured(given.json_, given.regex, given.choice, given.grammar).source()
    if request.response_format is None or request.response_format.type == "text":
        return None
    if request.response_format.json_schema is None:
        return Structured(json={"type": "object"}).source()
    return Structured(json=request.response_format.json_schema.schema_).source()


def _tools_source(
    llama: Llama, request: ChatRequest, tools: Tools | None, content: GrammarSource | None
) -> tuple[GrammarSource | None, str]:
    """The grammar of calls if they need one, and the parameter to blame if the whole grammar does not compile."""
    if tools is None or not tools.is_held:
        return None, "structured_outputs" if request.structured_outputs is not None else "response_format"
    compiler, parallel = llama.constraints.compiler, request.allows_many_calls
    if tools.must_call:
        return calls_grammar(tools.tools, tools.format, compiler, parallel=parallel), "tools"
    source = auto_grammar(tools.tools, tools.format, compiler, parallel=parallel, content=content)
    return source, "tools" if content is None else "response_format"
