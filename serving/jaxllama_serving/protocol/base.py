"""The strict base of every request model, and the one place that turns what they reject into a 400."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from jaxllama_serving.protocol.errors import ApiError, invalid, shorten

MAX_ID = 2**31 - 1


def with_example(**fields: Any) -> ConfigDict:
    """A model's config whose JSON schema has an example."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class Strict(BaseModel):
    """An object of exactly these fields, without conversions: "1" is not a number. `null` is "not given"."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}

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


def parse[M: Strict](model: type[M], data: Mapping[str, Any], *, lenient: bool = False) -> tuple[M, tuple[str, ...]]:
    """Returns the request that `data` holds, and the unknown fields that `lenient` dropped (else none).

    Raises: ApiError, status 400, whose param is the path of the first field at fault.
    """
    dropped: tuple[str, ...] = ()
    if lenient:
        dropped = tuple(key for key in data if key not in model.model_fields)
        data = {key: value for key, value in data.items() if key in model.model_fields}
    try:
        return model.model_validate(data), dropped
    except ValidationError as error:
        raise _as_api_error(model, error.errors(include_url=False)) from None


def refuse(
    data: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], prefix: str = "", *, reason: str = "not supported"
) -> dict[str, Any]:
    """Returns `data` without the fields of `table`, each of which may only be null or one of the values beside it.

    Raises: ApiError, status 400.
    """
    kept = dict(data)
    for name, harmless in table.items():
        if name not in kept:
            continue
        value = kept.pop(name)
        # By type too: False == 0 and True == 1 in Python, not in JSON.
        if value is not None and not any(type(value) is type(ok) and value == ok for ok in harmless):
            raise invalid(
                f"{prefix}{name} is {reason}. Leave it out, or give its default.",
                prefix + name,
                "unsupported_parameter",
            )
    return kept


def _as_api_error(model: type[BaseModel], errors: list[ErrorDetails]) -> ApiError:
    problems = [_describe(model, error) for error in errors[:3]]
    more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
    message = "; ".join(message for _, message, _ in problems) + more
    return invalid(message, problems[0][0], problems[0][2])


def _describe(model: type[BaseModel], error: ErrorDetails) -> tuple[str | None, str, str | None]:
    path, kind = _path(error["loc"]), error["type"]
    if kind == "extra_forbidden":
        return path, f"{path} is not a parameter of this route", "unknown_parameter"
    if kind == "missing":
        return path, f"{path} is required: {_wanted(model, error['loc'])}", "missing_required_parameter"
    if kind == "problem":
        return path, f"{path}: {error['msg']}", None
    if kind == "disagreement":
        return error["ctx"]["param"], error["msg"], None
    return path, f"{path} must be {_wanted(model, error['loc'])}, got {shorten(error['input'])}", None


def _wanted(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    inner: type[BaseModel] | None = model
    wanted = "an object"
    for step in loc:
        if inner is not None and isinstance(step, str) and step in inner.model_fields:
            field = inner.model_fields[step]
            wanted = field.description or wanted
            inner = _nested(field.annotation)
        elif isinstance(step, int) and inner is not None:
            wanted = "an object"
    return wanted


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _nested(part)) is not None), None)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            name = step if step.isprintable() and 0 < len(step) <= 64 else shorten(step, 64)
            path += f".{name}" if path else name
    return path
