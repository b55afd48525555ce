"""What an answer must look like, and how long the model may reason before it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from jaxllama_serving.protocol.base import Strict, disagreement

type Effort = Literal["none", "low", "medium", "high"]
EFFORTS = '"none", "low", "medium" or "high"'


class JsonSchemaFormat(Strict):
    """A schema with a name. It always holds, `strict` or not."""

    name: str = Field("", max_length=64, description="a string of at most 64 characters")
    description: str = Field("", description="a string")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema, an object")
    strict: bool = Field(True, description="a boolean")


class ResponseFormat(Strict):
    """What OpenAI calls the format of the answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description='one of "text", "json_object" and "json_schema"'
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="an object with a schema")

    @model_validator(mode="after")
    def _schema_goes_with_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise disagreement(
                "response_format", 'response_format: json_schema goes with type "json_schema", and only there'
            )
        return self


class StructuredOutputs(Strict):
    """One of four kinds of grammar."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="a JSON schema, an object")
    regex: str | None = Field(None, description="a regular expression, a string")
    choice: list[str] | None = Field(None, description="a list of strings")
    grammar: str | None = Field(None, description="a grammar in Lark or GBNF, a string")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise disagreement("structured_outputs", "structured_outputs needs one of json, regex, choice and grammar")
        return self


class Reasoning(Strict):
    """Whether and how hard to reason."""

    enabled: bool | None = Field(None, description="a boolean")
    effort: Effort | None = Field(None, description=EFFORTS)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.enabled is not None and self.effort is not None and self.enabled == (self.effort == "none"):
            raise disagreement("reasoning", f"reasoning: enabled ({self.enabled}) and effort ({self.effort}) disagree")
        return self


class TemplateKwargs(Strict):
    """The variables of templates that a request may set; both are names of the same thing."""

    enable_thinking: bool | None = Field(None, description="a boolean")
    thinking: bool | None = Field(None, description="a boolean")
