"""The chat request: strict models, and the one place that turns what they reject into a 400. No jax, no aiohttp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from jaxllama_serving.errors import ApiError, invalid, shorten

MAX_TOKENS = 1_000_000
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_ID = 2**31 - 1

# Not built yet, so refused by name; the values listed ask for nothing and are what clients send by default.
NOT_YET: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
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
    "return_token_ids": (False,),
    "return_seed": (False,),
    "cache_salt": (),
    "priority": (0,),
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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class TextPart(_Strict):
    """One part of a message's content."""

    type: Literal["text"] = Field(description='"text" (this model reads no other kind of part)')
    text: str = Field(description="a string")


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(_Strict):
    """One message; `reasoning_content` of an earlier answer is accepted and dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description='one of "system", "developer", "user", "assistant" and "tool"'
    )
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)] = Field(
        description="a string or a list of text parts"
    )
    reasoning_content: str | None = Field(None, description="a string, in assistant messages only")
    tool_call_id: str | None = Field(None, description="a string, in tool messages only")

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> ChatMessage:
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("custom", "a tool message needs tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise PydanticCustomError("custom", "tool_call_id belongs in tool messages only")
        if self.role != "assistant" and self.reasoning_content is not None:
            raise PydanticCustomError("custom", "reasoning_content belongs in assistant messages only")
        return self

    @property
    def text(self) -> str:
        """The content as one string; parts are joined with nothing between."""
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool = Field(False, description="a boolean")
    continuous_usage_stats: bool = Field(False, description="a boolean")


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _number(default: float | None, low: float, high: float, *, above: bool = False) -> Any:
    description = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    return Field(default, gt=low if above else None, ge=None if above else low, le=high, description=description)


def _integer(default: int | None, low: int, high: int) -> Any:
    return Field(default, ge=low, le=high, description=f"an integer from {low} to {high}")


class ChatRequest(_Strict):
    """The body of a chat completion request, within its bounds. None means "not given" where it is allowed."""

    model: str = Field(min_length=1, max_length=256, description="a model name of 1 to 256 characters")
    messages: list[ChatMessage] = Field(min_length=1, description="a list of at least one message")
    stream: bool = Field(False, description="a boolean")
    stream_options: StreamOptions | None = Field(None, description="an object, and only with stream: true")
    temperature: float | None = _number(None, 0, 2)
    top_p: float | None = _number(None, 0, 1, above=True)
    min_p: float | None = _number(None, 0, 1)
    top_k: int | None = Field(None, ge=-1, lt=1000, description="an integer from 0 to 999, or -1 (0 and -1 are off)")
    max_tokens: int | None = _integer(None, 0, MAX_TOKENS)
    max_completion_tokens: int | None = _integer(None, 0, MAX_TOKENS)
    min_tokens: int = _integer(0, 0, MAX_TOKENS)
    presence_penalty: float = _number(0.0, -2, 2)
    frequency_penalty: float = _number(0.0, -2, 2)
    repetition_penalty: float | None = _number(None, 0.01, 5)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        default_factory=list,
        max_length=MAX_STOP_STRINGS,
        description=f"a string or at most {MAX_STOP_STRINGS} strings, each of 1 to {MAX_STOP_BYTES} bytes",
    )
    include_stop_str_in_output: bool = Field(False, description="a boolean")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_ID)]] = Field(
        default_factory=list,
        max_length=MAX_STOP_TOKEN_IDS,
        description=f"a list of at most {MAX_STOP_TOKEN_IDS} token ids",
    )
    ignore_eos: bool = Field(False, description="a boolean")
    n: int = _integer(1, 1, 16)
    seed: int | None = _integer(None, 0, 2**63 - 1)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict,
        max_length=MAX_LOGIT_BIAS,
        description=f"an object of at most {MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100",
    )
    user: str | None = Field(None, max_length=1024, description="a string of at most 1024 characters")
    metadata: dict[str, str] | None = Field(None, max_length=64, description="an object of at most 64 strings")
    store: Literal[False] = Field(False, description="false (this server stores nothing)")
    service_tier: Literal["auto"] = Field("auto", description='"auto" (this server has one tier)')

    @field_validator("stop")
    @classmethod
    def _stop_bytes(cls, stop: list[str]) -> list[str]:
        for i, text in enumerate(stop):
            if len(text.encode()) > MAX_STOP_BYTES:
                raise PydanticCustomError("custom", f"string {i} is longer than {MAX_STOP_BYTES} bytes")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        for key in bias:
            # str(int(key)) == key also refuses "01" and "+1", which would be doubles of "1".
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key and int(key) <= MAX_ID):
                raise PydanticCustomError("custom", f"the key {shorten(key)} is not a token id")
        return bias

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is only allowed with stream: true")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise PydanticCustomError(
                "max_tokens",
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) differ",
            )
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The bound on the completion under either of its names; None means to the end of the context."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens


def parse_chat_request(data: dict[str, Any], *, lenient: bool = False) -> tuple[ChatRequest, tuple[str, ...]]:
    """Returns the request that `data` holds, and the unknown fields that `lenient` dropped (else none).

    Raises: ApiError, status 400, whose param is the path of the first field at fault.
    """
    data = _refuse_not_yet(data, NOT_YET, "")
    messages = data.get("messages")
    if isinstance(messages, list):
        data["messages"] = [
            _refuse_not_yet(message, NOT_YET_IN_MESSAGES, f"messages[{i}].") if isinstance(message, dict) else message
            for i, message in enumerate(messages)
        ]
    dropped: tuple[str, ...] = ()
    if lenient:
        dropped = tuple(key for key in data if key not in ChatRequest.model_fields)
        data = {key: value for key, value in data.items() if key in ChatRequest.model_fields}
    try:
        return ChatRequest.model_validate(data), dropped
    except ValidationError as error:
        raise _as_api_error(error.errors(include_url=False)) from None


def _refuse_not_yet(data: dict[str, Any], table: Mapping[str, tuple[Any, ...]], prefix: str) -> dict[str, Any]:
    kept = dict(data)
    for name, harmless in table.items():
        if name not in kept:
            continue
        value = kept.pop(name)
        # By type too: False == 0 and True == 1 in Python, not in JSON.
        if value is not None and not any(type(value) is type(ok) and value == ok for ok in harmless):
            raise invalid(
                f"{prefix}{name} is not implemented yet. Leave it out, or give its default.",
                prefix + name,
                "unsupported_parameter",
            )
    return kept


_NESTED: Mapping[str, type[BaseModel]] = {
    "messages": ChatMessage,
    "content": TextPart,
    "stream_options": StreamOptions,
}


def _as_api_error(errors: list[ErrorDetails]) -> ApiError:
    problems = [_problem(error) for error in errors[:3]]
    more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
    message = "; ".join(message for _, message, _ in problems) + more
    return invalid(message, problems[0][0], problems[0][2])


def _problem(error: ErrorDetails) -> tuple[str | None, str, str | None]:
    path, kind = _path(error["loc"]), error["type"]
    value = shorten(error["input"])
    if kind == "extra_forbidden":
        return path, f"{path} is not a parameter of this route", "unknown_parameter"
    if kind == "missing":
        return path, f"{path} is required: {_wanted(error['loc'])}", "missing_required_parameter"
    if kind == "custom":
        return path, f"{path}: {error['msg']}", None
    if kind in ("stream_options", "max_tokens"):
        return kind, error["msg"], None
    return path, f"{path} must be {_wanted(error['loc'])}, got {value}", None


def _wanted(loc: tuple[int | str, ...]) -> str:
    model: type[BaseModel] | None = ChatRequest
    wanted = "an object"
    for step in loc:
        if model is not None and isinstance(step, str) and step in model.model_fields:
            wanted = model.model_fields[step].description or wanted
            model = _NESTED.get(step)
        elif isinstance(step, int) and model is not None:
            wanted = "an object"
    return wanted


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            name = step if step.isprintable() and len(step) <= 64 else shorten(step, 64)
            path += f".{name}" if path else name
    return path
