"""The strict base of every request model, and the one place that turns what they reject into a 400."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAliasType, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from jaxllama.errors import quote
from jaxllama_serving.protocol.errors import ApiError, invalid
from jaxllama_serving.protocol.refused import Refusals, refusals_in

MAX_ID = 2**31 - 1
HARMLESS_ANYWHERE = frozenset({"cache_control"})
"""Fields that mean nothing here and are accepted at any depth."""
MAX_NAMED_FIELDS = 16
MAX_NAMED_CHARS = 96
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]$-]")


def with_example(**fields: Any) -> ConfigDict:
    """A model's config whose JSON schema has an example."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class Strict(BaseModel):
    """An object of these fields, without conversions: "1" is not a number. `null` is "not given", whatever the field.

    What is in none of its fields is kept apart (`unknown_fields`), but for what `refused` refuses by name.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, hide_input_in_errors=True)
    refused: ClassVar[Refusals] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None and key not in HARMLESS_ANYWHERE}
        for name, refused in refusals_in(given, cls.refused):
            instead = f", or {refused.instead}" if refused.instead else ""
            message = f"is not supported here. Leave it out{instead}."
            raise PydanticCustomError("unsupported", "{message}", {"name": name, "message": message})
        return {key: value for key, value in given.items() if key not in cls.refused}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        required = described.get("required", [])
        for name, value in described.get("properties", {}).items():
            if name not in required:
                described["properties"][name] = _nullable(value)
        return schema


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in about}
    options = rest["anyOf"] if set(rest) == {"anyOf"} else [rest]
    if about.get("default", ...) is None:
        del about["default"]
    return {**about, "anyOf": [*(option for option in options if option != {"type": "null"}), {"type": "null"}]}


def number(default: float | None, low: float, high: float, *, above: bool = False) -> Any:
    """A field for a number; with `above`, `low` itself is not allowed."""
    description = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    return Field(default, gt=low if above else None, ge=None if above else low, le=high, description=description)


def integer(default: int | None, low: int, high: int) -> Any:
    """A field for an integer."""
    return Field(default, ge=low, le=high, description=f"an integer from {low} to {high}")


def boolean(default: bool) -> Any:
    """A field for true or false."""
    return Field(default, description="a boolean")


def problem(message: str) -> PydanticCustomError:
    """What a validator raises for a bad value: the path of the field goes before `message`."""
    return PydanticCustomError("problem", "{message}", {"message": message})


def disagreement(param: str, message: str) -> PydanticCustomError:
    """What a model's validator raises for fields that do not fit together; `param` is the one to blame."""
    return PydanticCustomError("disagreement", "{message}", {"message": message, "param": param})


def unsupported(message: str) -> PydanticCustomError:
    """What a field's validator raises for a value that means something, but nothing that this server can do."""
    return PydanticCustomError("unsupported", "{message}", {"message": f": {message}"})


def _only_text(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise unsupported(f'a part of type {kind!r:.40} is not supported, only "text": this model reads text alone')
    return kind


class TextPart(Strict):
    """One part of a message's content."""

    type: Annotated[Literal["text"], BeforeValidator(_only_text, json_schema_input_type=Literal["text"])] = Field(
        description='"text" (this model reads no other kind of part)'
    )
    text: str = Field(description="a string")


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


type TextParts = Annotated[
    list[TextPart],
    BeforeValidator(_as_parts, json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1)]),
]
"""A text, or its parts."""


def parse[M: Strict](model: type[M], data: Mapping[str, Any], *, strict_fields: bool = False) -> M:
    """Returns the request that `data` holds. Unknown fields are a fault only with `strict_fields`.

    Raises: ApiError, status 400, whose param is the path of the first field at fault.
    """
    try:
        request = model.model_validate(data)
    except ValidationError as error:
        raise _as_api_error(model, error.errors(include_url=False)) from None
    if strict_fields:
        refuse_unknown(unknown_fields(request))
    return request


def refuse_unknown(fields: Sequence[str]) -> None:
    """Raises: ApiError, status 400, if there are any."""
    if fields:
        more = f" (and {len(fields) - 3} more)" if len(fields) > 3 else ""
        message = "; ".join(f"{path} is not a parameter of this route" for path in fields[:3]) + more
        raise invalid(message, fields[0], "unknown_parameter")


def unknown_fields(request: Strict) -> tuple[str, ...]:
    """Returns the paths of the fields that no model knows, those of outer objects first."""
    found: list[str] = []
    level: list[tuple[tuple[int | str, ...], Any]] = [((), request)]
    while level:
        inner: list[tuple[tuple[int | str, ...], Any]] = []
        for loc, value in level:
            if isinstance(value, Strict):
                found += [_path((*loc, name)) for name in value.model_extra or ()]
                fields = type(value).model_fields.items()
                inner += [((*loc, field.alias or name), getattr(value, name)) for name, field in fields]
            elif isinstance(value, list) and value and isinstance(value[0], Strict):
                inner += [((*loc, i), item) for i, item in enumerate(value)]
        level = inner
    return tuple(found)


def name_fields(paths: Sequence[str]) -> str:
    """Returns the first of `paths` for a header: only characters that are safe in one, and a bounded length."""
    return ", ".join(_UNSAFE.sub("?", path)[:MAX_NAMED_CHARS] for path in paths[:MAX_NAMED_FIELDS])


def _as_api_error(model: type[BaseModel], errors: list[ErrorDetails]) -> ApiError:
    problems = [_describe(model, error) for error in errors[:3]]
    more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
    message = "; ".join(message for _, message, _ in problems) + more
    return invalid(message, problems[0][0], problems[0][2])


def _describe(model: type[BaseModel], error: ErrorDetails) -> tuple[str | None, str, str | None]:
    path, kind = _path(error["loc"]), error["type"]
    if kind == "unsupported":
        name = error["ctx"].get("name")
        path = _path((*error["loc"], name)) if name is not None else path
        joint = " " if name is not None else ""
        return path, f"{path}{joint}{error['msg']}", "unsupported_parameter"
    if kind == "missing":
        return path, f"{path} is required: {_wanted(model, error['loc'])[0]}", "missing_required_parameter"
    if kind == "problem":
        return path, f"{path}: {error['msg']}", None
    if kind == "disagreement":
        return error["ctx"]["param"], error["msg"], None
    wanted, depth = _wanted(model, error["loc"])
    if depth < len(error["loc"]):
        whole = _path(error["loc"][:depth])
        return path, f"{path}: {whole} must be {wanted}, got {quote(error['input'])}", None
    return path, f"{path} must be {wanted}, got {quote(error['input'])}", None


def _wanted(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, int]:
    """What is to be at `loc`, or at its first steps where the rest is within a field of plain values; and how many."""
    inner: type[BaseModel] | None = model
    wanted = "an object"
    for depth, step in enumerate(loc):
        if inner is None:
            return wanted, depth
        if isinstance(step, str) and step in inner.model_fields:
            field = inner.model_fields[step]
            wanted = field.description or wanted
            inner = _nested(field.annotation)
        elif isinstance(step, int):
            wanted = "an object"
    return wanted, len(loc)


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type holds, if it holds one."""
    if isinstance(annotation, TypeAliasType):
        return _nested(annotation.__value__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _nested(part)) is not None), None)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            name = step if step.isprintable() and 0 < len(step) <= 64 else quote(step, 64)
            path += f".{name}" if path else name
    return path
