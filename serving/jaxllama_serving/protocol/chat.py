"""The body of a chat completion request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from jaxllama_serving.protocol.base import Strict, boolean, disagreement, integer, parse, problem, refuse, with_example
from jaxllama_serving.protocol.generation import MAX_TOKENS, MAX_TOP_LOGPROBS, GenerationRequest

# Not built yet, so refused by name; the values listed ask for nothing and are what clients send by default.
NOT_YET: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "reasoning": (),
    "reasoning_effort": (),
    "thinking_budget": (),
    "include_reasoning": (True,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
NOT_YET_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "annotations": ([],),
    "refusal": (),
    "name": (),
    "prefix": (False,),
}
_NOT_YET = "not implemented yet"


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
        description="a string or a list of text parts"
    )
    reasoning_content: str | None = Field(None, description="a string, in assistant messages only")
    tool_call_id: str | None = Field(None, description="a string, in tool messages only")

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> ChatMessage:
        if self.role == "tool" and self.tool_call_id is None:
            raise problem("a tool message needs tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise problem("tool_call_id belongs in tool messages only")
        if self.role != "assistant" and self.reasoning_content is not None:
            raise problem("reasoning_content belongs in assistant messages only")
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
        return self

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
    data = refuse(data, NOT_YET, reason=_NOT_YET)
    messages = data.get("messages")
    if isinstance(messages, list):
        data["messages"] = [
            refuse(message, NOT_YET_IN_MESSAGES, f"messages[{i}].", reason=_NOT_YET)
            if isinstance(message, dict)
            else message
            for i, message in enumerate(messages)
        ]
    return parse(ChatRequest, data, lenient=lenient)
