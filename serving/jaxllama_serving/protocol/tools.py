"""Tools in a chat request: what may be called, what must be, and what was."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from jaxllama_serving.protocol.base import Strict, disagreement

MAX_TOOLS = 128
type Name = Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]


class FunctionSpec(Strict):
    """A function that the model may call."""

    name: Name = Field(description="a name of 1 to 64 letters, digits, _ and -")
    description: str = Field("", description="a string")
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}},
        description="the JSON schema of the arguments, an object",
    )
    strict: bool = Field(False, description="a boolean: true holds calls to the schema with tool_choice auto too")


class ToolSpec(Strict):
    """One entry of `tools`."""

    type: Literal["function"] = Field(description='"function" (there is no other kind of tool here)')
    function: FunctionSpec = Field(description="an object with a name")


class FunctionName(Strict):
    """Which function."""

    name: Name = Field(description="a name of 1 to 64 letters, digits, _ and -")


def _as_choice(choice: Any) -> Any:
    return {"type": choice} if isinstance(choice, str) else choice


class ToolChoice(Strict):
    """Whether the model must call, and what."""

    type: Literal["none", "auto", "required", "function"] = Field(
        description='"none", "auto", "required", or an object with type "function" and a function\'s name'
    )
    function: FunctionName | None = Field(None, description="an object with a name")

    @model_validator(mode="after")
    def _function_is_named(self) -> Self:
        if (self.type == "function") != (self.function is not None):
            raise disagreement(
                "tool_choice", 'tool_choice: a function\'s name goes with type "function", and only there'
            )
        return self


class NamedChoice(Strict):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionName


type ToolChoiceField = Annotated[
    ToolChoice,
    BeforeValidator(_as_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedChoice),
]


class FunctionCall(Strict):
    """What the model called."""

    name: Name = Field(description="a name of 1 to 64 letters, digits, _ and -")
    arguments: str = Field(description="a string: the arguments as JSON")


class ToolCall(Strict):
    """One call in an assistant's message."""

    id: str = Field(min_length=1, max_length=256, description="a string of 1 to 256 characters")
    type: Literal["function"] = Field("function", description='"function"')
    function: FunctionCall = Field(description="an object with name and arguments")
    index: int | None = Field(None, ge=0, description="an integer, as streams have it")
