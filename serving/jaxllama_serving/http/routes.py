"""The table of the API's routes: the application serves it and OpenAPI describes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from jaxllama_serving.http import admin, status
from jaxllama_serving.protocol import responses
from jaxllama_serving.protocol.admin import ProfileRequest
from jaxllama_serving.protocol.chat import ChatRequest
from jaxllama_serving.protocol.completions import CompletionRequest
from jaxllama_serving.protocol.tokens import DetokenizeRequest, TokenizeRequest
from jaxllama_serving.requests import tokens
from jaxllama_serving.requests.chat import chat_completions
from jaxllama_serving.requests.completions import completions

PREFIXES = ("/v1", "/v1/openai")
EVERYWHERE = ("", *PREFIXES)

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    """One route under each of `prefixes`.

    `body` and `response` are models of JSON, `chunk` that of a stream's events. An `is_open` route needs no key where
    it has no prefix. `errors` are statuses that no other kind of route has.
    """

    method: str
    path: str
    handler: Handler
    prefixes: tuple[str, ...] = EVERYWHERE
    body: type[BaseModel] | None = None
    response: type[BaseModel] | None = None
    chunk: type[BaseModel] | None = None
    media_type: str = "application/json"
    is_open: bool = False
    errors: tuple[int, ...] = ()


ROUTES = (
    Route(
        "POST",
        "/chat/completions",
        chat_completions,
        PREFIXES,
        body=ChatRequest,
        response=responses.ChatCompletion,
        chunk=responses.ChatCompletionChunk,
    ),
    Route(
        "POST",
        "/completions",
        completions,
        PREFIXES,
        body=CompletionRequest,
        response=responses.Completion,
        chunk=responses.Completion,
    ),
    Route("GET", "/models", status.models, PREFIXES, response=responses.ModelList),
    Route("GET", "/models/{id:.+}", status.model, PREFIXES, response=responses.Model),
    Route("POST", "/tokenize", tokens.tokenize, body=TokenizeRequest, response=responses.Tokens),
    Route("POST", "/detokenize", tokens.detokenize, body=DetokenizeRequest, response=responses.Text),
    Route("GET", "/tokenizer_info", tokens.tokenizer_info, response=responses.TokenizerInfo),
    Route("GET", "/health", status.health, response=responses.Status, is_open=True),
    Route("GET", "/ready", status.ready, response=responses.Status, is_open=True),
    Route("GET", "/metrics", status.metrics, media_type="text/plain"),
    Route("GET", "/version", status.version, response=responses.Version),
    Route("GET", "/openapi.json", status.openapi),
    Route(
        "POST", "/admin/profile", admin.profile, ("",), body=ProfileRequest, response=responses.Profile, errors=(409,)
    ),
)
