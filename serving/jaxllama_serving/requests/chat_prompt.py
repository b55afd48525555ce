"""What forms a chat's answers besides sampling: the rendered prompt, grammars, tools and the bounds of reasoning."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxllama import Structured
from jaxllama.errors import GrammarError, RequestError, quote
from jaxllama.text.constraint import OutputConstraint
from jaxllama.text.reasoning import ReasoningTags
from jaxllama.text.structured import Grammar, GrammarCompiler, GrammarSource
from jaxllama.text.tool_parsing import LiveParser, LooseParser, ToolParser
from jaxllama.text.tools import (
    TOOL_FORMATS,
    Tool,
    ToolFormat,
    auto_grammar,
    calls_grammar,
)
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.protocol.base import refuse_unknown
from jaxllama_serving.protocol.chat import ChatRequest
from jaxllama_serving.protocol.errors import invalid
from jaxllama_serving.protocol.output_format import Form

if TYPE_CHECKING:
    from jaxllama import ChatTemplate, Llama
    from jaxllama.text.chat import RenderedChat

EFFORT_BUDGETS: Mapping[str, int | None] = {"minimal": 256, "low": 1024, "medium": 8192, "high": None, "xhigh": None}
"""Tokens of reasoning for models whose template knows no efforts."""
_BLAME_S = 1.0
"""How long a request that is refused is looked through for what is to blame."""
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that turns reasoning on and off."""


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
class ChatPrompt:
    """`starts_in_reasoning` is None when the output is not to be split; it may continue the prompt's last message.

    `ignored` are the paths of fields that the model's template does not ask for.
    """

    prompt_ids: list[int]
    starts_in_reasoning: bool | None
    reasoning_tags: ReasoningTags
    continues: bool
    tools: Tools | None
    constraints: tuple[OutputConstraint | None, ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class RenderedRequest:
    """A request's messages and tools as the template renders them, and what was found on the way.

    `offered` are the tools that may be called. `effort` is that of reasoning under any of its names. `ignored` are the
    paths of fields that the model's template does not ask for.
    """

    prompt_ids: list[int]
    rendered: RenderedChat
    template: ChatTemplate
    offered: tuple[Tool, ...]
    effort: str | None
    ignored: tuple[str, ...]


def render_request(llama: Llama, config: ServerConfig, request: ChatRequest) -> RenderedRequest:
    """Returns the prompt of `request`. Compiles no grammar.

    Raises: ApiError (400), RequestError, ChatTemplateError.
    """
    template = template_of(llama).variant(with_tools=bool(request.offered_tools))
    assert llama.tokenizer is not None
    effort = _effort(request, template)
    ignored = _check_kwargs(request, template)
    if config.strict_fields:
        refuse_unknown(ignored)
    shown = _tools(request)
    names = {spec.function.name for spec in request.offered_tools}
    offered = tuple(tool for tool in shown if tool.name in names)
    close, variables = _reasoning_variables(request, template, effort)
    rendered = template.render(
        [message.for_template() for message in request.messages],
        tool_format=tool_format(config, template),
        tools=shown if offered else (),
        continue_last=request.continues,
        add_generation_prompt=request.add_generation_prompt is not False,
        close_reasoning=close,
        variables=variables,
    )
    return RenderedRequest(llama.tokenizer.encode_rendered(rendered), rendered, template, offered, effort, ignored)


def make_prompt(llama: Llama, config: ServerConfig, request: ChatRequest, num_choices: int) -> ChatPrompt:
    """Returns the prompt of `request` and what holds its answers in form, one constraint a choice.

    Raises: ApiError (400), RequestError, ChatTemplateError.
    """
    found = render_request(llama, config, request)
    template, rendered, effort = found.template, found.rendered, found.effort
    content = _content(request.form) if request.form is not None else None
    tools = None
    if found.offered:
        is_held = _holds_calls(request, found.offered) or content is not None
        tools = Tools(found.offered, tool_format(config, template), request.forces_tools, is_held)
    starts = rendered.starts_in_reasoning
    grammar = _grammar(llama, request, tools, content, starts)
    budget = request.thinking_budget
    if budget is None and starts is not None and effort is not None and "reasoning_effort" not in template.variables:
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
    return ChatPrompt(found.prompt_ids, starts, template.reasoning_tags, continues, tools, constraints, found.ignored)


def template_of(llama: Llama) -> ChatTemplate:
    """Raises: ApiError, status 400, for a model that cannot chat."""
    if llama.chat_template is None or llama.tokenizer is None:
        raise invalid("This model has no chat template, so it cannot chat.", "messages")
    return llama.chat_template


def tool_format(config: ServerConfig, template: ChatTemplate) -> ToolFormat:
    """How calls are written and read."""
    return template.tool_format if config.tool_parser is None else TOOL_FORMATS[config.tool_parser]


def _check_kwargs(request: ChatRequest, template: ChatTemplate) -> tuple[str, ...]:
    """Returns the paths of the template's variables that the request sets and the template does not ask for.

    Raises: ApiError for a name that only the server sets.
    """
    ignored = []
    for name in request.chat_template_kwargs:
        path = f"chat_template_kwargs.{name}"
        if name in template.own_variables:
            raise invalid(
                f"{quote(path)} is not supported: the server sets it itself.", path[:100], "unsupported_parameter"
            )
        if name not in template.variables and not (name in THINKING_SWITCHES and template.has_reasoning):
            ignored.append(path)
    return tuple(ignored)


def _effort(request: ChatRequest, template: ChatTemplate) -> str | None:
    """The effort that the request asks for under any of its names, one of `Effort` or None.

    A model that does not reason follows every effort.

    Raises: ApiError for names that disagree, and for reasoning asked of a model that has none.
    """
    kwargs, reasoning = request.chat_template_kwargs, request.reasoning
    flags: dict[str, bool | None] = {}
    for name in THINKING_SWITCHES:
        if isinstance(flag := kwargs.get(name), bool):
            flags[f"chat_template_kwargs.{name}"] = flag
    flags["reasoning.enabled"] = reasoning.enabled if reasoning is not None else None
    effort = request.reasoning_effort or (reasoning.effort if reasoning is not None else None)
    if effort is not None:
        flags["reasoning_effort"] = effort != "none"
    given = {name: flag for name, flag in flags.items() if flag is not None}
    if len(set(given.values())) > 1:
        raise invalid(f"{' and '.join(given)} disagree on whether to reason.", next(iter(given)))
    wanted = "reasoning.enabled" if flags["reasoning.enabled"] else None
    wanted = "thinking_budget" if request.thinking_budget is not None else wanted
    if wanted is not None and not template.has_reasoning:
        raise invalid(f"{wanted}: this model does not reason.", wanted, "unsupported_parameter")
    return "none" if given and not any(given.values()) else effort


def _reasoning_variables(
    request: ChatRequest, template: ChatTemplate, effort: str | None
) -> tuple[bool, dict[str, Any]]:
    """Whether to close the reasoning in the prompt, and the template's own variables where it has some."""
    known = [name for name in THINKING_SWITCHES if name in template.variables]
    kwargs = request.chat_template_kwargs
    is_on = effort is not None or (request.reasoning is not None and request.reasoning.enabled is True)
    is_on = is_on or any(isinstance(kwargs.get(name), bool) for name in THINKING_SWITCHES)
    variables: dict[str, Any] = {name: effort != "none" for name in known if is_on}
    variables |= {name: value for name, value in kwargs.items() if name in template.variables}
    knows_efforts = effort not in (None, "none") and "reasoning_effort" in template.variables
    if knows_efforts and variables.setdefault("reasoning_effort", effort) != effort:
        raise invalid("reasoning_effort and chat_template_kwargs.reasoning_effort differ.", "reasoning_effort")
    return effort == "none" and not known and not request.continues, variables


def _tools(request: ChatRequest) -> list[Tool]:
    """Raises: RequestError, whose param is the path of the schema at fault."""
    tools = []
    for i, spec in enumerate(request.tools):
        function = spec.function
        try:
            tools.append(Tool(function.name, function.description, function.parameters, spec.is_strict))
        except RequestError as error:
            raise RequestError(f"tools[{i}].function.{error}", f"tools[{i}].function.parameters") from None
    return tools


def _holds_calls(request: ChatRequest, tools: Sequence[Tool]) -> bool:
    # Where only some tools may be called, a call of another would otherwise come out as text.
    is_held = request.forces_tools or not request.parallel_tool_calls or len(tools) < len(request.tools)
    return is_held or any(tool.strict for tool in tools)


def _content(form: Form) -> GrammarSource:
    """The grammar of an answer that is no call.

    Raises: GrammarError, whose param is the path of the field that asks for it.
    """
    try:
        return Structured(**{form.kind: form.value}).source()
    except GrammarError as error:
        raise GrammarError(f"{form.param}{str(error).removeprefix(form.kind)}", form.param) from None


def _grammar(
    llama: Llama, request: ChatRequest, tools: Tools | None, content: GrammarSource | None, starts: bool | None
) -> Grammar | None:
    """What holds the answer, if anything does: calls of `tools`, `content`, or either.

    Raises: GrammarError, whose param is the path of the first part that cannot be used, or "tools" if each can.
    """
    if tools is None or not tools.is_held:
        return llama.constraints.compile(content, request.form.param, starts) if content and request.form else None
    compiler, parallel = llama.constraints.compiler, request.allows_many_calls
    try:
        if tools.must_call:
            source = calls_grammar(tools.tools, tools.format, compiler, parallel=parallel)
        else:
            source = auto_grammar(tools.tools, tools.format, compiler, parallel=parallel, content=content)
        return llama.constraints.compile(source, "tools", starts)
    except GrammarError:
        _blame_a_part(compiler, request, tools, None if tools.must_call else content)
        raise


def _blame_a_part(compiler: GrammarCompiler, request: ChatRequest, tools: Tools, content: GrammarSource | None) -> None:
    """Raises: GrammarError for the first part that cannot be used by itself."""
    deadline = time.monotonic() + _BLAME_S
    names = [spec.function.name for spec in request.tools]
    forms = [
        Form("json", tool.parameters, f"tools[{names.index(tool.name)}].function.parameters") for tool in tools.tools
    ]
    if content is not None and request.form is not None:
        forms.append(request.form)
    for form in forms:
        compiler.compile(_content(form), form.param)
        if time.monotonic() > deadline:
            return
