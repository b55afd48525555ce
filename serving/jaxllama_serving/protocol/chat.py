"""The body of a chat completion request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jaxllama.decode.params import MAX_TOP_LOGPROBS
from jaxllama_serving.protocol.base import (
    Strict,
    TextParts,
    boolean,
    disagreement,
    parse,
    problem,
    with_example,
)
from jaxllama_serving.protocol.output_format import (
    EFFORTS,
    Effort,
    Form,
    GuidedFields,
    Prediction,
    Reasoning,
    ResponseFormat,
    StructuredOutputs,
    TemplateKwargs,
)
from jaxllama_serving.protocol.refused import CHAT, MESSAGE, Refusals
from jaxllama_serving.protocol.shared_fields import GenerationRequest, field_of
from jaxllama_serving.protocol.tools import MAX_TOOLS, ToolCall, ToolChoiceField, ToolSpec


class ChatMessage(Strict):
    """One message. What an answer of ours holds is accepted back."""

    refused: ClassVar[Refusals] = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description='one of "system", "developer", "user", "assistant" and "tool"'
    )
    content: TextParts = Field(
        min_length=1,
        description="a string or a list of at least one text part; null beside tool_calls or reasoning",
    )
    name: str | None = Field(None, max_length=256, description="a string of at most 256 characters, for the template")
    reasoning_content: str | None = Field(None, description="a string, in assistant messages only")
    reasoning: str | None = Field(None, description="as reasoning_content")
    annotations: Any = Field(None, description="anything: as some answers have it; no effect")
    tool_call_id: str | None = Field(None, description="a string, in tool messages only")
    tool_calls: list[ToolCall] = Field(
        default_factory=list, max_length=MAX_TOOLS, description="a list of calls, in assistant messages only"
    )
    prefix: bool = Field(False, description="a boolean, true in a last assistant message to continue it")

    @model_validator(mode="before")
    @classmethod
    def _content_may_be_missing(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("content") is not None or data.get("role") != "assistant":
            return data
        has_more = any(data.get(name) for name in ("tool_calls", "reasoning_content", "reasoning"))
        return {**data, "content": ""} if has_more else data

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> ChatMessage:
        if self.role == "tool" and self.tool_call_id is None:
            raise problem("a tool message needs tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise problem("tool_call_id belongs in tool messages only")
        if self.role != "assistant" and self.reasoning_text:
            raise problem("reasoning_content and reasoning belong in assistant messages only")
        if self.role != "assistant" and self.tool_calls:
            raise problem("tool_calls belong in assistant messages only")
        if self.role != "assistant" and self.prefix:
            raise problem("prefix belongs in assistant messages only")
        if len({self.reasoning_content, self.reasoning} - {None}) > 1:
            raise problem("reasoning_content and reasoning differ")
        return self

    @property
    def reasoning_text(self) -> str | None:
        """The reasoning under either of its names."""
        return self.reasoning_content if self.reasoning_content is not None else self.reasoning

    def for_template(self) -> dict[str, Any]:
        """The message as `ChatTemplate.render` takes it; parts of the content are joined with nothing between."""
        text = "".join(part.text for part in self.content)
        fields = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_text}
        plain: dict[str, Any] = {
            "role": self.role,
            "content": text,
            **{key: value for key, value in fields.items() if value},
        }
        if self.tool_calls:
            calls = [call.model_dump(include={"id", "type", "function"}) for call in self.tool_calls]
            plain |= {"content": text or None, "tool_calls": calls}
        return plain


class ChatRequest(GuidedFields, GenerationRequest):
    """The body of a chat completion request, within its bounds. None means "not given" where it is allowed."""

    model_config = with_example(
        model="default", messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=16
    )
    refused: ClassVar[Refusals] = CHAT

    messages: list[ChatMessage] = Field(min_length=1, description="a list of at least one message")
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
        None, description='"none", "auto", "required" or an object that names functions'
    )
    parallel_tool_calls: bool = boolean(True)
    response_format: ResponseFormat | None = Field(None, description="an object with a type")
    structured_outputs: StructuredOutputs | None = Field(None, description="an object with one field")
    reasoning: Reasoning | None = Field(None, description="an object with enabled or effort")
    reasoning_effort: Effort | None = Field(None, description=EFFORTS)
    thinking_budget: int | None = field_of("thinking_budget")
    include_reasoning: bool = boolean(True)
    continue_final_message: bool = boolean(False)
    add_generation_prompt: bool | None = Field(None, description="a boolean")
    chat_template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="an object of strings, numbers and booleans"
    )
    prediction: Prediction | None = Field(None, description='an object with type "content" and content')

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise disagreement("top_logprobs", "top_logprobs is only allowed with logprobs: true")
        self._check_tools()
        self._check_messages()
        forms = self._forms()
        if len(forms) > 1:
            params = [form.param.split(".")[0] for form in forms]
            raise disagreement(params[-1], f"{' and '.join(params)} exclude each other")
        if self.ignore_eos and (forms or self.forces_tools):
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
        if self.tool_choice.must_call and not self.tools:
            raise disagreement("tool_choice", "tool_choice needs tools")
        unknown = next((name for name in self.tool_choice.names or () if name not in names), None)
        if unknown is not None:
            raise disagreement("tool_choice", f"tool_choice names {unknown}, a function that is not in tools")

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

    def _forms(self) -> list[Form]:
        found = [
            self.response_format.form if self.response_format is not None else None,
            self.structured_outputs.form if self.structured_outputs is not None else None,
            *self.guided_forms(),
        ]
        return [form for form in found if form is not None]

    @property
    def form(self) -> Form | None:
        """What the content must look like."""
        return next(iter(self._forms()), None)

    @property
    def forces_tools(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice is not None and self.tool_choice.must_call

    @property
    def allows_many_calls(self) -> bool:
        """Whether an answer may hold several calls; a function that was named is called once."""
        return self.parallel_tool_calls and (self.tool_choice is None or self.tool_choice.function is None)

    @property
    def offered_tools(self) -> list[ToolSpec]:
        """The tools that the model may call."""
        names = self.tool_choice.names if self.tool_choice is not None else None
        return self.tools if names is None else [tool for tool in self.tools if tool.function.name in names]


def parse_chat_request(data: Mapping[str, Any], *, strict_fields: bool = False) -> ChatRequest:
    """Returns the request that `data` holds.

    Raises: ApiError, status 400, whose param is the path of the first field at fault.
    """
    return parse(ChatRequest, data, strict_fields=strict_fields)
