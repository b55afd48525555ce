"""What an answer must look like, and how long the model may reason before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from jaxllama_serving.protocol.base import Strict, TextParts, disagreement, problem
from jaxllama_serving.protocol.refused import Refusals, Refused

type Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
EFFORTS = '"none", "minimal", "low", "medium", "high" or "xhigh"'
MAX_TEMPLATE_KWARGS = 64


@dataclass(frozen=True)
class Form:
    """What an answer must look like: one of the kinds of `Structured`, and the path of the field that asks for it."""

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any
    param: str


class JsonSchemaFormat(Strict):
    """A schema with a name. It always holds, `strict` or not."""

    name: str = Field("", max_length=64, description="a string of at most 64 characters")
    description: str = Field("", description="a string")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema, an object")
    strict: bool = Field(True, description="a boolean")


class ResponseFormat(Strict):
    """What OpenAI calls the format of the answer.

    Some clients put the schema, and what belongs to it, beside the type instead of into `json_schema`.
    """

    refused: ClassVar[Refusals] = {
        "value": Refused("give the schema as json_schema: {schema}"),
        "grammar": Refused("use structured_outputs: {grammar}"),
        "pattern": Refused("use structured_outputs: {regex}"),
    }

    type: Literal["text", "json_object", "json_schema"] = Field(
        description='one of "text", "json_object" and "json_schema"'
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="an object with a schema")
    name: str | None = Field(None, max_length=64, description="a string of at most 64 characters")
    description: str | None = Field(None, description="a string")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON schema, an object")
    strict: bool | None = Field(None, description="a boolean")

    @model_validator(mode="after")
    def _schema_goes_with_type(self) -> Self:
        if self.json_schema is not None and self.type != "json_schema":
            raise disagreement("response_format", 'response_format: json_schema goes with type "json_schema" only')
        if self.schema_ is not None and self.type == "text":
            raise disagreement("response_format", 'response_format: schema does not go with type "text"')
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise disagreement("response_format", 'response_format: type "json_schema" needs json_schema')
        if self.json_schema is not None and self.schema_ not in (None, self.json_schema.schema_):
            raise disagreement("response_format", "response_format: schema and json_schema.schema differ")
        return self

    @property
    def form(self) -> Form | None:
        """What it holds the answer to."""
        if self.json_schema is not None:
            return Form("json", self.json_schema.schema_, "response_format.json_schema.schema")
        if self.schema_ is not None:
            return Form("json", self.schema_, "response_format.schema")
        return Form("json", {"type": "object"}, "response_format") if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """One of four kinds of grammar."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="a JSON schema, an object")
    regex: str | None = Field(None, description="a regular expression, a string")
    choice: list[str] | None = Field(None, min_length=1, description="a list of at least one string")
    grammar: str | None = Field(None, description="a grammar in Lark or GBNF, a string")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self._given()) != 1:
            raise disagreement("structured_outputs", "structured_outputs needs one of json, regex, choice and grammar")
        return self

    def _given(self) -> list[Form]:
        values = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        return _forms(values, "structured_outputs.")

    @property
    def form(self) -> Form:
        """What it holds the answer to."""
        return self._given()[0]


def _forms(values: Mapping[Any, Any], prefix: str) -> list[Form]:
    return [Form(kind, value, prefix + kind) for kind, value in values.items() if value is not None]


def _as_schema(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        read = json.loads(schema)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise problem("must be a JSON schema, an object or its text")
    return read


class GuidedFields(Strict):
    """What vLLM's clients still call the fields of `structured_outputs`."""

    guided_json: Annotated[
        dict[str, Any] | None, BeforeValidator(_as_schema, json_schema_input_type=dict[str, Any] | str)
    ] = Field(None, description="as structured_outputs.json, or its text")
    guided_regex: str | None = Field(None, description="as structured_outputs.regex, a string")
    guided_choice: list[str] | None = Field(None, min_length=1, description="a list of at least one string")
    guided_grammar: str | None = Field(None, description="as structured_outputs.grammar, a string")

    def guided_forms(self) -> list[Form]:
        """What they hold the answer to."""
        values = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        return _forms(values, "guided_")


class Prediction(Strict):
    """A draft of the answer. It has no effect on the answer; with speculation, one that resembles it is sooner."""

    type: Literal["content"] = Field(description='"content"')
    content: TextParts = Field(min_length=1, description="a string or a list of at least one text part")

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.content)


class Reasoning(Strict):
    """Whether and how hard to reason."""

    refused: ClassVar[Refusals] = {
        "max_tokens": Refused("use thinking_budget"),
        "exclude": Refused("use include_reasoning: false", (False,)),
    }

    enabled: bool | None = Field(None, description="a boolean")
    effort: Effort | None = Field(None, description=EFFORTS)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.enabled is not None and self.effort is not None and self.enabled == (self.effort == "none"):
            raise disagreement("reasoning", f"reasoning: enabled ({self.enabled}) and effort ({self.effort}) disagree")
        return self


def _template_kwargs(kwargs: Any) -> Any:
    if not isinstance(kwargs, dict):
        raise problem("must be an object of strings, numbers and booleans")
    given = {name: value for name, value in kwargs.items() if value is not None}
    if len(given) > MAX_TEMPLATE_KWARGS:
        raise problem(f"at most {MAX_TEMPLATE_KWARGS} are allowed, got {len(given)}")
    return given


def _template_value(value: Any) -> Any:
    if not isinstance(value, str | bool | int | float):
        raise problem("must be a string, a number or a boolean")
    return value


type TemplateValue = Annotated[Any, PlainValidator(_template_value, json_schema_input_type=str | bool | int | float)]
type TemplateKwargs = Annotated[
    dict[str, TemplateValue],
    BeforeValidator(_template_kwargs, json_schema_input_type=dict[str, TemplateValue | None]),
]
