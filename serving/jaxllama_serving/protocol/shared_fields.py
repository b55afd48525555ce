"""The fields that every route which generates has: limits, sampling, stops, and what the answer tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator

from jaxllama.decode.controls import Boolean, Control, Integer, Number
from jaxllama.decode.params import (
    CONTROLS,
    MAX_LOGIT_BIAS,
    MAX_STOP_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
)
from jaxllama.errors import quote
from jaxllama_serving.protocol.base import MAX_ID, Strict, boolean, disagreement, integer, number, problem


def field_of(name: str) -> Any:
    """The field of a control that is a number, an integer or a boolean.

    Its default is None, "not given", where a checkpoint may give one.
    """
    control = CONTROLS[name]
    default = None if control.in_checkpoint else control.default
    match control.domain:
        case Number(low, high, above):
            return number(default, low, high, above=above)
        case Integer(low, high):
            return Field(default, ge=low, le=high, description=control.domain.wanted)
        case Boolean():
            return boolean(bool(default))
    raise AssertionError(f"{name} is none of these")


SERVICE_TIER = "default"
"""What an answer says to whoever asks for a tier: there is one."""


def _any(about: str) -> Any:
    return Field(None, description=f"anything: {about}")


class HarmlessFields(Strict):
    """What clients send for other servers, for their books or for their users."""

    user: Any = _any("who asks; no effect")
    safety_identifier: Any = _any("who asks; no effect")
    metadata: Any = _any("for the client's own books; no effect")
    store: Any = _any("this server stores nothing")
    service_tier: Any = _any("this server has one tier, and answers with it")
    verbosity: Any = _any("no effect")
    prompt_cache_key: Any = _any("no effect: a prompt is found in the cache by its tokens")
    prompt_cache_retention: Any = _any("no effect: the cache forgets what was used least")


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool = boolean(False)
    continuous_usage_stats: bool = boolean(False)


def _as_list(stop: Any) -> Any:
    if stop == "":
        # Here, where the path is still the one that the client wrote.
        raise problem(f"must be a string or at most {MAX_STOP_STRINGS} strings, each of 1 to {MAX_STOP_BYTES} bytes")
    return [stop] if isinstance(stop, str) else stop


type StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_BYTES)]


class _Head(HarmlessFields):
    model: str = Field(min_length=1, max_length=256, description="a model name of 1 to 256 characters")
    stream: bool = boolean(False)
    stream_options: StreamOptions | None = Field(None, description="an object, and only with stream: true")


def _annotation(control: Control) -> Any:
    kind: Any = int if isinstance(control.domain, Integer) else float
    return kind | None if control.in_checkpoint else kind


DEVICE_CONTROLS = tuple(name for name, control in CONTROLS.items() if control.dtype)
"""The controls that need no field below: nothing here reads them but `requests.prepare`, by these names."""

if TYPE_CHECKING:
    _DeviceControls = _Head
else:
    _DeviceControls = create_model(
        "_DeviceControls",
        __base__=_Head,
        **{name: (_annotation(CONTROLS[name]), field_of(name)) for name in DEVICE_CONTROLS},
    )


class GenerationRequest(_DeviceControls):
    """What chat and text completions share. None means "not given" where it is allowed."""

    max_tokens: int | None = field_of("max_tokens")
    max_completion_tokens: int | None = field_of("max_tokens")
    min_tokens: int = field_of("min_tokens")
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(
            _as_list,
            json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
        ),
    ] = Field(
        default_factory=list,
        max_length=MAX_STOP_STRINGS,
        description=CONTROLS["stop"].domain.wanted,
    )
    include_stop_str_in_output: bool = field_of("include_stop_str_in_output")
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_ID)]] = Field(
        default_factory=list,
        max_length=MAX_STOP_TOKEN_IDS,
        description=CONTROLS["stop_token_ids"].domain.wanted,
    )
    ignore_eos: bool = field_of("ignore_eos")
    n: int = integer(1, 1, 16)
    seed: int | None = field_of("seed")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict,
        max_length=MAX_LOGIT_BIAS,
        description=CONTROLS["logit_bias"].domain.wanted,
        json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"}},
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description=f"an integer from 0 to {MAX_TOP_LOGPROBS}, and not with stream: true",
    )
    return_token_ids: bool = boolean(False)
    return_seed: bool = boolean(False)
    priority: int = Field(0, ge=-10, le=10, description="an integer from -10 (first) to 10 (last)")
    cache_salt: str | None = Field(None, min_length=1, max_length=256, description="a string of 1 to 256 characters")

    @field_validator("stop")
    @classmethod
    def _stop_bytes(cls, stop: list[str]) -> list[str]:
        for i, text in enumerate(stop):
            if len(text.encode()) > MAX_STOP_BYTES:
                raise problem(f"string {i} is longer than {MAX_STOP_BYTES} bytes")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        for key in bias:
            # str(int(key)) == key also refuses "01" and "+1", which would be doubles of "1".
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key and int(key) <= MAX_ID):
                raise problem(f"the key {quote(key)} is not a token id")
        return bias

    @model_validator(mode="after")
    def _stream_fields_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "stream_options is only allowed with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise disagreement("prompt_logprobs", "prompt_logprobs is not allowed with stream: true")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise disagreement(
                "max_tokens",
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) differ",
            )
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The bound on a completion under either of its names; None means to the end of the context."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
