"""The body of a text completion request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PlainValidator, model_validator

from jaxllama.decode.params import MAX_TOKENS
from jaxllama_serving.protocol.base import MAX_ID, boolean, disagreement, parse, problem, with_example
from jaxllama_serving.protocol.refused import COMPLETIONS, Refusals
from jaxllama_serving.protocol.shared_fields import GenerationRequest, field_of

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this route only."""

type Prompt = str | list[int]
type TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
type TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS:
            raise problem(f"at most {MAX_PROMPTS} prompts are allowed, got {len(value)}")
        if all(isinstance(item, str) for item in value) or all(_are_ids(item) for item in value):
            return value
    raise problem("must be a string, a list of strings, a list of token ids, or a list of such lists, none empty")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item <= MAX_ID for item in value)


class CompletionRequest(GenerationRequest):
    """The body of a text completion request, within its bounds. None means "not given" where it is allowed."""

    model_config = with_example(model="default", prompt="Once upon a time", max_tokens=8, temperature=0)
    refused: ClassVar[Refusals] = COMPLETIONS

    prompt: Annotated[
        list[Prompt],
        PlainValidator(
            _prompts,
            json_schema_input_type=str
            | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
            | TokenIds
            | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
        ),
    ] = Field(description="a string, a list of strings, a list of token ids, or a list of such lists")
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_TOKENS,
        description=f"an integer from 0 to {MAX_TOKENS}; {DEFAULT_MAX_TOKENS} if not given",
    )
    echo: bool = boolean(False)
    logprobs: int | None = field_of("logprobs")
    best_of: int | None = Field(None, ge=1, le=16, description="an integer from n to 16")

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise disagreement("best_of", f"best_of ({self.best_of}) must be at least n ({self.n})")
        if self.stream and self.num_drawn > self.n:
            raise disagreement("best_of", f"best_of ({self.best_of}) above n ({self.n}) cannot be streamed")
        if len(self.prompt) * self.num_drawn > MAX_PROMPTS:
            raise disagreement(
                "prompt",
                f"{len(self.prompt)} prompts with {self.num_drawn} completions each are more than {MAX_PROMPTS}",
            )
        return self

    @property
    def max_new_tokens(self) -> int:
        """The bound on a completion under either of its names."""
        given = super().max_new_tokens
        return DEFAULT_MAX_TOKENS if given is None else given

    @property
    def num_drawn(self) -> int:
        """Completions drawn of each prompt; the `n` best are returned."""
        return self.n if self.best_of is None else self.best_of


def parse_completion_request(data: Mapping[str, Any], *, strict_fields: bool = False) -> CompletionRequest:
    """Returns the request that `data` holds.

    Raises: ApiError, status 400, whose param is the path of the first field at fault.
    """
    return parse(CompletionRequest, data, strict_fields=strict_fields)
