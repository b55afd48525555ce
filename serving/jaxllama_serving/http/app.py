"""`make_app`: the routes, and the middleware around all of them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.auth import KeyRing
from jaxllama_serving.http.chat_page import add_page
from jaxllama_serving.http.connection import SECURITY_HEADERS, error_response, new_request_id
from jaxllama_serving.http.context import CONTEXT, IGNORED_HEADER, RequestContext
from jaxllama_serving.http.events import to_json
from jaxllama_serving.http.framing import check_transfer_encoding
from jaxllama_serving.http.openapi import make_openapi
from jaxllama_serving.http.routes import ROUTES, Handler
from jaxllama_serving.http.status import OPENAPI
from jaxllama_serving.protocol.errors import ApiError, from_exception, from_http_status
from jaxllama_serving.requests.run import log_failure
from jaxllama_serving.service import SERVICE, Service

if TYPE_CHECKING:
    from jaxllama import Llama

logger = logging.getLogger("jaxllama.serving")

_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(, ?[A-Za-z0-9-]{1,64}){0,63}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def make_app(llama: Llama | None, config: ServerConfig) -> web.Application:
    """Returns the application. With `llama` None it answers 503 until `app[SERVICE].set_llama` is called.

    Must be called inside a running event loop. Serve it with `wire.Listener`, which adds the limits on connections
    and cancels the handlers of clients that have gone.
    """
    open_resources: set[web.AbstractResource] = set()
    app = web.Application(
        middlewares=[_edge(config), _authenticate(KeyRing(config.api_keys), open_resources)],
        client_max_size=config.max_body_bytes,
    )
    service = Service(llama, config)
    app[SERVICE] = service
    app.on_cleanup.append(service.close)
    document = make_openapi(
        ROUTES, config.model_names, needs_key=bool(config.api_keys), strict_fields=config.strict_fields
    )
    app[OPENAPI] = to_json(document)
    for route in ROUTES:
        for prefix in route.prefixes:
            add = app.router.add_get if route.method == "GET" else app.router.add_post
            resource = add(prefix + route.path, route.handler).resource
            if route.is_open and not prefix and resource is not None:
                open_resources.add(resource)
    open_resources |= add_page(app)
    return app


def _authenticate(
    keys: KeyRing, open_resources: set[web.AbstractResource]
) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        # By the resource that was matched, never by the path: the router alone knows what a path means, and a route
        # that nobody thought of, or none at all, stays closed.
        if request.match_info.route.resource not in open_resources:
            request[CONTEXT].key = keys.check(request.headers.get("Authorization"))
        return await handler(request)

    return authenticate


def _edge(config: ServerConfig) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Gives every request its id, every response its headers, every error its envelope, and logs one line."""
        given = request.headers.get("X-Request-Id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        headers = {**SECURITY_HEADERS, **_cors_headers(request, config), "X-Request-Id": request_id}
        request[CONTEXT] = RequestContext(request_id, headers)
        status: int | None = None
        try:
            response = await _respond(request, handler)
            if not response.prepared:
                response.headers.update(headers)
            status = response.status
            return response
        finally:
            _log(request, status)

    return edge


async def _respond(request: web.Request, handler: Handler) -> web.StreamResponse:
    request_id = request[CONTEXT].id
    if _is_preflight(request):
        return web.Response(status=204)
    try:
        check_transfer_encoding(request)
        return await handler(request)
    except ApiError as error:
        return error_response(error, request_id)
    except web.HTTPException as error:
        return error_response(from_http_status(error.status, error.headers), request_id)
    except ConnectionError:
        raise
    except Exception as error:
        log_failure(request_id, error)
        return error_response(from_exception(error, request_id), request_id)


def _cors_headers(request: web.Request, config: ServerConfig) -> dict[str, str]:
    if not config.cors_origins:
        return {}
    headers = {"Vary": "Origin, Access-Control-Request-Headers"}
    origin = request.headers.get("Origin")
    if origin in config.cors_origins:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = f"X-Request-Id, Retry-After, {IGNORED_HEADER}"
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        if request.method == "OPTIONS":
            headers["Access-Control-Allow-Methods"] = "GET, POST"
            # Clients send headers of their own (OpenAI's: x-stainless-…): an origin that is trusted may send any.
            asked = request.headers.get("Access-Control-Request-Headers", "")
            headers["Access-Control-Allow-Headers"] = asked if _HEADER_NAMES.fullmatch(asked) else "Authorization"
            headers["Access-Control-Max-Age"] = "600"
    return headers


def _is_preflight(request: web.Request) -> bool:
    return (
        request.method == "OPTIONS"
        and "Access-Control-Request-Method" in request.headers
        and "Access-Control-Allow-Origin" in request[CONTEXT].headers
    )


def _log(request: web.Request, status: int | None) -> None:
    # The route's pattern, not the path, and the method only if known: what a client chose may hold anything.
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unmatched"
    method = request.method if request.method in ("GET", "HEAD", "POST", "OPTIONS") else "OTHER"
    context = request[CONTEXT]
    request.app[SERVICE].metrics.count_request(
        route, status, failed=context.failed, num_ignored_fields=context.num_ignored_fields
    )
    seconds = time.monotonic() - context.started
    level = logging.DEBUG if route in ("/health", "/ready", "/metrics") else logging.INFO
    logger.log(
        level,
        "%s %s %s %s %.0f ms prompt=%d completion=%d",
        context.id,
        method,
        route,
        "gone" if status is None else status,
        seconds * 1e3,
        context.num_prompt_tokens,
        context.num_completion_tokens,
        extra={
            "request_id": context.id,
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "prompt_tokens": context.num_prompt_tokens,
            "completion_tokens": context.num_completion_tokens,
        },
    )
