"""Tools in a chat request: what may be called, what must be, and what was."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from jaxllama_serving.protocol.base import Strict, disagreement, problem, unsupported

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


def _only_functions(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "function":
        raise unsupported(f'there are no tools of type {kind!r:.40} here, only "function"')
    return kind


class ToolSpec(Strict):
    """One entry of `tools`."""

    type: Annotated[
        Literal["function"], BeforeValidator(_only_functions, json_schema_input_type=Literal["function"])
    ] = Field(description='"function" (there is no other kind of tool here)')
    function: FunctionSpec = Field(description="an object with a name")
    strict: bool | None = Field(None, description="a boolean, as in function")

    @property
    def is_strict(self) -> bool:
        """Whether calls must fit the schema with tool_choice auto too."""
        return self.function.strict or bool(self.strict)


class FunctionName(Strict):
    """Which function."""

    name: Name = Field(description="a name of 1 to 64 letters, digits, _ and -")


class NamedTool(Strict):
    """One of the tools, by its function's name."""

    type: Literal["function"] = Field("function", description='"function"')
    function: FunctionName = Field(description="an object with a name")


class AllowedTools(Strict):
    """The tools that may be called, of those that the model sees."""

    mode: Literal["auto", "required"] = Field(description='"auto" or "required"')
    tools: list[NamedTool] = Field(
        min_length=1, max_length=MAX_TOOLS, description=f"a list of 1 to {MAX_TOOLS} functions by name"
    )


def _as_choice(choice: Any) -> Any:
    if not isinstance(choice, str):
        return choice
    if choice not in ("none", "auto", "required"):
        # Here, where the path is still the one that the client wrote.
        raise problem('must be "none", "auto", "required" or an object that names a function')
    return {"type": choice}


class ToolChoice(Strict):
    """Whether the model must call, and what."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"] = Field(
        description='"none", "auto", "required", or an object with type "function" or "allowed_tools"'
    )
    function: FunctionName | None = Field(None, description="an object with a name")
    allowed_tools: AllowedTools | None = Field(None, description="an object with mode and tools")

    @model_validator(mode="after")
    def _what_belongs_to_the_type_is_given(self) -> Self:
        if (self.type == "function") != (self.function is not None):
            raise disagreement(
                "tool_choice", 'tool_choice: a function\'s name goes with type "function", and only there'
            )
        if (self.type == "allowed_tools") != (self.allowed_tools is not None):
            raise disagreement(
                "tool_choice", 'tool_choice: allowed_tools goes with type "allowed_tools", and only there'
            )
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        is_required = self.allowed_tools is not None and self.allowed_tools.mode == "required"
        return self.type in ("required", "function") or is_required

    @property
    def names(self) -> tuple[str, ...] | None:
        """The functions that may be called; None: all."""
        if self.type == "none":
            return ()
        if self.function is not None:
            return (self.function.name,)
        if self.allowed_tools is not None:
            return tuple(tool.function.name for tool in self.allowed_tools.tools)
        return None


class NamedChoice(Strict):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionName


class AllowedChoice(Strict):
    """The functions that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


type ToolChoiceField = Annotated[
    ToolChoice,
    BeforeValidator(
        _as_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedChoice | AllowedChoice
    ),
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
