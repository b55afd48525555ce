"""The body of a chat completion request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from jaxllama_serving.protocol.base import Strict, boolean, disagreement, integer, parse, problem, refuse, with_example
from jaxllama_serving.protocol.output_format import (
    EFFORTS,
    Effort,
    Reasoning,
    ResponseFormat,
    StructuredOutputs,
    TemplateKwargs,
)
from jaxllama_serving.protocol.shared_fields import MAX_TOKENS, MAX_TOP_LOGPROBS, GenerationRequest
from jaxllama_serving.protocol.tools import MAX_TOOLS, ToolCall, ToolChoiceField, ToolSpec

# Refused by name; the values listed ask for nothing and are what clients send by default.
REFUSED: Mapping[str, tuple[Any, ...]] = {"chat_template": ()}
REFUSED_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "annotations": ([],),
    "refusal": (),
    "name": (),
}


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"] = Field(description='"text" (this model reads no other kind of part)')
    text: str = Field(description="a string")


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(Strict):
    """One message; `reasoning_content` of an earlier answer is accepted and dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description='one of "system", "developer", "user", "assistant" and "tool"'
    )
    content: Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])] = Field(
        description="a string or a list of text parts; null beside tool_calls"
    )
    reasoning_content: str | None = Field(None, description="a string, in assistant messages only")
    tool_call_id: str | None = Field(None, description="a string, in tool messages only")
    tool_calls: list[ToolCall] = Field(
        default_factory=list, max_length=MAX_TOOLS, description="a list of calls, in assistant messages only"
    )
    prefix: bool = Field(False, description="a boolean, true in a last assistant message to continue it")

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("tool_calls") and data.get("content") is None:
            return {**data, "content": []}
        return data

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> ChatMessage:
        if self.role == "tool" and self.tool_call_id is None:
            raise problem("a tool message needs tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise problem("tool_call_id belongs in tool messages only")
        if self.role != "assistant" and self.reasoning_content is not None:
            raise problem("reasoning_content belongs in assistant messages only")
        if self.role != "assistant" and self.tool_calls:
            raise problem("tool_calls belong in assistant messages only")
        if self.role != "assistant" and self.prefix:
            raise problem("prefix belongs in assistant messages only")
        return self

    @property
    def text(self) -> str:
        """The content as one string; parts are joined with nothing between."""
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of a chat completion request, within its bounds. None means "not given" where it is allowed."""

    model_config = with_example(
        model="default", messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=16
    )

    messages: list[ChatMessage] = Field(min_length=1, description="a list of at least one message")
    max_completion_tokens: int | None = integer(None, 0, MAX_TOKENS)
    logprobs: bool = boolean(False)
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description=f"an integer from 0 to {MAX_TOP_LOGPROBS}, and only with logprobs: true",
    )
    tools: list[ToolSpec] = Field(
        default_factory=list, max_length=MAX_TOOLS, description=f"a list of at most {MAX_TOOLS} functions"
    )
    tool_choice: ToolChoiceField | None = Field(
        None, description='"none", "auto", "required" or an object that names a function'
    )
    parallel_tool_calls: bool = boolean(True)
    response_format: ResponseFormat | None = Field(None, description="an object with a type")
    structured_outputs: StructuredOutputs | None = Field(None, description="an object with one field")
    reasoning: Reasoning | None = Field(None, description="an object with enabled or effort")
    reasoning_effort: Effort | None = Field(None, description=EFFORTS)
    thinking_budget: int | None = integer(None, 0, MAX_TOKENS)
    include_reasoning: bool = boolean(True)
    continue_final_message: bool = boolean(False)
    add_generation_prompt: bool | None = Field(None, description="a boolean")
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="an object with enable_thinking or thinking")
    metadata: dict[str, str] | None = Field(None, max_length=64, description="an object of at most 64 strings")
    store: Literal[False] = Field(False, description="false (this server stores nothing)")
    service_tier: Literal["auto"] = Field("auto", description='"auto" (this server has one tier)')

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise disagreement(
                "max_tokens",
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) differ",
            )
        if self.top_logprobs and not self.logprobs:
            raise disagreement("top_logprobs", "top_logprobs is only allowed with logprobs: true")
        self._check_tools()
        self._check_messages()
        has_format = self.response_format is not None and self.response_format.type != "text"
        if has_format and self.structured_outputs is not None:
            raise disagreement("structured_outputs", "structured_outputs and response_format exclude each other")
        if self.ignore_eos and (has_format or self.structured_outputs is not None or self.forces_tools):
            raise disagreement("ignore_eos", "ignore_eos is not allowed with an answer that ends by itself")
        efforts = {self.reasoning_effort, self.reasoning.effort if self.reasoning is not None else None} - {None}
        if len(efforts) > 1:
            raise disagreement("reasoning_effort", "reasoning_effort and reasoning.effort differ")
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise disagreement("tools", f"tools: {doubled} is there twice")
        if self.tool_choice is None:
            return
        if self.tool_choice.type in ("required", "function") and not self.tools:
            raise disagreement("tool_choice", "tool_choice needs tools")
        if self.tool_choice.function is not None and self.tool_choice.function.name not in names:
            raise disagreement("tool_choice", "tool_choice names a function that is not in tools")

    def _check_messages(self) -> None:
        for i, message in enumerate(self.messages[:-1]):
            if message.prefix:
                raise disagreement(f"messages[{i}].prefix", f"messages[{i}].prefix: only the last message is continued")
        if self.continues and self.add_generation_prompt:
            raise disagreement(
                "add_generation_prompt",
                "add_generation_prompt: true and the continuation of a message exclude each other",
            )
        if self.continues and self.messages[-1].role != "assistant":
            raise disagreement(
                "continue_final_message", "continue_final_message: the last message is not the assistant's"
            )

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        return self.continue_final_message or self.messages[-1].prefix

    @property
    def forces_tools(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice is not None and self.tool_choice.type in ("required", "function")

    @property
    def allows_many_calls(self) -> bool:
        """Whether an answer may hold several calls; a function that was named is called once."""
        return self.parallel_tool_calls and (self.tool_choice is None or self.tool_choice.function is None)

    @property
    def offered_tools(self) -> list[ToolSpec]:
        """The tools that the model may call."""
        if self.tool_choice is not None and self.tool_choice.type == "none":
            return []
        if self.tool_choice is not None and self.tool_choice.function is not None:
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools

    @property
    def max_new_tokens(self) -> int | None:
        """The bound on the completion under either of its names; None means to the end of the context."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each token's log-probability; None for neither."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_chat_request(data: Mapping[str, Any], *, lenient: bool = False) -> tuple[ChatRequest, tuple[str, ...]]:
    """Returns the request that `data` holds, and the unknown fields that `lenient` dropped (else none).

    Raises: ApiError, status 400, whose param is the path of the first field at fault.
    """
    data = refuse(data, REFUSED, reason="not accepted: the server uses the model's own")
    messages = data.get("messages")
    if isinstance(messages, list):
        data["messages"] = [
            refuse(message, REFUSED_IN_MESSAGES, f"messages[{i}].") if isinstance(message, dict) else message
            for i, message in enumerate(messages)
        ]
    return parse(ChatRequest, data, lenient=lenient)
