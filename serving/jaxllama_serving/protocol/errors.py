"""`ApiError`: everything a client can be told has gone wrong, in OpenAI's envelope of four keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxllama.errors import (
    ChatTemplateError,
    ContextLengthError,
    EngineStoppedError,
    QueueFullError,
    RequestError,
    quote,
)

RETRY_AFTER_S = 2


@dataclass
class ApiError(Exception):
    """One refused or failed request: the HTTP status and what the envelope holds."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def envelope(self) -> dict[str, Any]:
        """Returns `{"error": {...}}` with all four keys."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request's own fault."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """A 503 that asks the client to come back."""
    return ApiError(503, message, "service_unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})


def timed_out(timeout_s: float | None) -> ApiError:
    """The 504 of a request that passed its deadline."""
    return ApiError(504, f"The request did not finish within {timeout_s:g} s (--request-timeout).", "timeout")


def model_not_found(name: str, known: tuple[str, ...]) -> ApiError:
    """The 404 of a model this server does not serve."""
    return ApiError(
        404,
        f"The model {quote(name)} does not exist here. This server serves: {', '.join(known)}.",
        param="model",
        code="model_not_found",
    )


def from_exception(error: BaseException, request_id: str) -> ApiError:
    """Returns what a client may know of `error`: a request's fault in full, our own by the id to quote alone."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return invalid(str(error), error.param or "messages", "context_length_exceeded")
        case RequestError():
            return invalid(str(error), error.param)
        case ChatTemplateError():
            return invalid(str(error), error.param or "messages")
        case QueueFullError():
            return ApiError(
                429,
                "The queue is full. Try again later.",
                "rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        case EngineStoppedError():
            return unavailable("The engine does not take requests now.")
    return ApiError(500, f"The server failed on this request. Quote the id {request_id}.", "server_error")


_HTTP_CODES = {
    404: ("not_found", "There is no such route. The API lives under /v1/ and /v1/openai/."),
    405: ("method_not_allowed", "This route does not take that method."),
    413: ("body_too_large", "The body is too large."),
    417: ("expectation_failed", "The Expect header may only say 100-continue."),
}


def from_http_status(status: int, headers: Mapping[str, str]) -> ApiError:
    """Returns the envelope of an error that aiohttp raised itself; of its `headers` only Allow is kept."""
    code, message = _HTTP_CODES.get(status, ("http_error", f"The request was refused with status {status}."))
    kind = "not_found" if status == 404 else "invalid_request_error" if status < 500 else "server_error"
    return ApiError(
        status, message, kind, code=code, headers={name: value for name, value in headers.items() if name == "Allow"}
    )
