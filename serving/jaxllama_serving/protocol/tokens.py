"""The bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from jaxllama_serving.protocol.base import MAX_ID, Strict, boolean, disagreement, with_example
from jaxllama_serving.protocol.chat import ChatMessage
from jaxllama_serving.protocol.refused import TOKENIZE, Refusals


class TokenizeRequest(Strict):
    """A text, or messages as the chat template renders them."""

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
    add_special_tokens: bool = boolean(True)
    add_generation_prompt: bool = boolean(True)
    return_token_strs: bool = boolean(False)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise disagreement("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """Token ids."""

    model_config = with_example(tokens=[1, 2, 3])

    model: str | None = Field(None, min_length=1, max_length=256, description="a model name of 1 to 256 characters")
    tokens: list[Annotated[int, Field(ge=0, le=MAX_ID)]] = Field(description="a list of token ids")
    skip_special_tokens: bool = boolean(False)
