"""The bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from jaxllama_serving.protocol.base import MAX_ID, Strict, boolean, disagreement, with_example
from jaxllama_serving.protocol.chat import ChatMessage
from jaxllama_serving.protocol.output_format import TemplateKwargs
from jaxllama_serving.protocol.refused import TOKENIZE, Refusals
from jaxllama_serving.protocol.tools import MAX_TOOLS, ToolChoiceField, ToolSpec

OF_CHATS = (
    "messages",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
)
"""The fields of `TokenizeRequest` that mean what they mean in a chat request."""


class TokenizeRequest(Strict):
    """A text, or messages and tools as the chat template renders them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "Hello"}],
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
            ],
        }
    )

    refused: ClassVar[Refusals] = TOKENIZE

    model: str | None = Field(None, min_length=1, max_length=256, description="a model name of 1 to 256 characters")
    prompt: str | None = Field(None, description="a string, unless messages are given")
    messages: list[ChatMessage] | None = Field(
        None, min_length=1, description="a list of at least one message, unless a prompt is given"
    )
    tools: list[ToolSpec] = Field(
        default_factory=list, max_length=MAX_TOOLS, description=f"a list of at most {MAX_TOOLS} functions"
    )
    tool_choice: ToolChoiceField | None = Field(None, description="as in a chat request")
    chat_template_kwargs: TemplateKwargs = Field(
        default_factory=dict, description="an object of strings, numbers and booleans"
    )
    continue_final_message: bool = boolean(False)
    add_generation_prompt: bool | None = Field(None, description="a boolean")
    add_special_tokens: bool = boolean(True)
    return_token_strs: bool = boolean(False)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise disagreement("prompt", "give either prompt or messages")
        shown = next((name for name in ("tools", "chat_template_kwargs") if getattr(self, name)), None)
        if self.prompt is not None and shown is not None:
            raise disagreement(shown, f"{shown} belongs to messages: a prompt is encoded as it is")
        return self


class DetokenizeRequest(Strict):
    """Token ids."""

    model_config = with_example(tokens=[1, 2, 3])

    model: str | None = Field(None, min_length=1, max_length=256, description="a model name of 1 to 256 characters")
    tokens: list[Annotated[int, Field(ge=0, le=MAX_ID)]] = Field(description="a list of token ids")
    skip_special_tokens: bool = boolean(False)
