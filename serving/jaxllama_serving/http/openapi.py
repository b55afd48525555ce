"""The API as OpenAPI 3.1, made of the table of routes and the models that validate."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from jaxllama_serving.http.routes import Route
from jaxllama_serving.protocol.responses import Error
from jaxllama_serving.service import version

ERRORS = {
    400: "The request's own fault: `param` is the path of the field, and the message says what was wanted.",
    401: "No API key, or a wrong one.",
    404: "Unknown model or route.",
    405: "The route does not take this method.",
    408: "The head or the body of the request came too slowly.",
    409: "A profile is being recorded already.",
    413: "The body is too large.",
    415: "The body is not JSON in UTF-8, or is compressed.",
    417: "An Expect header other than 100-continue.",
    429: "The queue is full. See Retry-After.",
    500: "The server failed. The message has an id to quote.",
    503: "Loading, draining or ill. See Retry-After.",
    504: "The request passed the server's deadline.",
}
"""Every status of an error, and what it says."""

_ALWAYS = (400, 401, 404, 405, 408, 417, 500, 503)
_WITH_BODY = (413, 415)
_GENERATING = (429, 504)


@cache
def make_openapi(
    routes: tuple[Route, ...], model_names: tuple[str, ...], *, needs_key: bool, strict_fields: bool = False
) -> dict[str, Any]:
    """Returns the document of `routes`, whose requests may ask for one of `model_names`."""
    models: list[type[BaseModel]] = [
        Error,
        *(m for route in routes for m in (route.body, route.response, route.chunk) if m is not None),
    ]
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in dict.fromkeys(models)]
    _, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    for body in {route.body.__name__ for route in routes if route.body is not None}:
        model = schemas["$defs"][body]["properties"].get("model")
        if model is not None:
            model["enum"] = [*model_names, *([None] if "anyOf" in model else [])]
    if strict_fields:
        for schema in schemas["$defs"].values():
            if "properties" in schema:
                schema["additionalProperties"] = False
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for prefix in route.prefixes:
            path = re.sub(r"{(\w+):[^}]*}", r"{\1}", prefix + route.path)
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, prefix, path)
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxllama",
            "version": version(),
            "description": "One Llama model over OpenAI's API. Every route under /v1 is under /v1/openai too.",
        },
        "security": [{"bearer": []}] if needs_key else [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"bearer": bearer},
            "responses": {f"Error{status}": _error(text) for status, text in ERRORS.items()},
            "headers": {"RequestId": {"description": "The request's id, for logs.", "schema": {"type": "string"}}},
        },
    }


def _operation(route: Route, prefix: str, path: str) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": "_".join(re.findall(r"\w+", f"{route.method.lower()} {path}")),
        "summary": (route.handler.__doc__ or "").split("\n")[0].rstrip("."),
        "responses": {"200": {"description": "Success.", "headers": _HEADERS, "content": _content(route)}},
    }
    statuses = {*_ALWAYS, *(_WITH_BODY if route.body else ()), *(_GENERATING if route.chunk else ()), *route.errors}
    operation["responses"] |= {str(s): {"$ref": f"#/components/responses/Error{s}"} for s in sorted(statuses)}
    if route.is_open and not prefix:
        operation["security"] = []
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(route.body)}}}
    names = re.findall(r"{(\w+)}", path)
    if names:
        schema = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": schema} for n in names]
    return operation


def _content(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.response is not None:
        content["application/json"] = {"schema": _ref(route.response)}
    elif route.media_type == "application/json":
        content[route.media_type] = {"schema": {"type": "object"}}
    else:
        content[route.media_type] = {"schema": {"type": "string"}}
    if route.chunk is not None:
        about = "With stream: true. Events `data: …`, each one chunk or an Error, then `data: [DONE]`."
        message = {"contentMediaType": "application/json", "contentSchema": {"anyOf": [_ref(route.chunk), _ref(Error)]}}
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, message]}
        # OpenAPI 3.1 does not say how a stream is described; tools read the schema as that of each event.
        event = {"type": "object", "required": ["data"], "properties": {"data": data}, "description": about}
        content["text/event-stream"] = {"schema": event}
    return content


def _error(description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(Error)}}
    return {"description": description, "headers": _HEADERS, "content": content}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


_HEADERS = {"X-Request-Id": {"$ref": "#/components/headers/RequestId"}}
