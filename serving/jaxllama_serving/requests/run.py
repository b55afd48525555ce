"""One generating request from its body to its last byte; what the answer looks like is its `Response`'s business."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.context import CONTEXT
from jaxllama_serving.http.events import EventStream, abort, to_json
from jaxllama_serving.http.limits import read_json_body
from jaxllama_serving.protocol.errors import ApiError, from_exception, timed_out
from jaxllama_serving.requests.choices import Choices
from jaxllama_serving.requests.logprobs import score_prompts
from jaxllama_serving.requests.prepare import Prepared
from jaxllama_serving.requests.response import Response
from jaxllama_serving.service import SERVICE, Service

if TYPE_CHECKING:
    from jaxllama import Llama

logger = logging.getLogger("jaxllama.serving")


async def run_request[P: Prepared](
    request: web.Request, prepare: Callable[[Llama, ServerConfig, bytes], P], response_type: type[Response]
) -> web.StreamResponse:
    """Answers a request that `prepare` reads from its body with what `response_type` makes of the choices.

    Raises: ApiError for what fails before the first byte of the answer.
    """
    service = request.app[SERVICE]
    service.ready_llama()
    with service.requests.counted():
        body = await read_json_body(request, service.config)
        return await _run(request, service, body, prepare, response_type)


async def _run(
    request: web.Request,
    service: Service,
    body: bytes,
    prepare: Callable[[Llama, ServerConfig, bytes], Prepared],
    response_type: type[Response],
) -> web.StreamResponse:
    config, context = service.config, request[CONTEXT]
    llama = service.ready_llama()
    choices: Choices | None = None
    events: EventStream | None = None
    timeout = asyncio.timeout(config.request_timeout_s)
    try:
        async with timeout:
            prepared = await service.in_worker(prepare, llama, config, body)
            context.num_prompt_tokens = prepared.num_prompt_tokens
            context.ignore(prepared.ignored)
            if prepared.request.stream:
                events = EventStream(request, context.headers, config.write_timeout_s)
            # A digest has one length, so a key and a salt cannot be taken for another pair.
            scope = (context.key or b"") + (prepared.request.cache_salt or "").encode()
            response = await _begin(service, llama, prepared, response_type, events, scope)
            choices = Choices(
                llama.engine,
                response.choices(),
                priority=prepared.request.priority,
                cache_scope=scope,
                max_tokens=config.max_stream_tokens if events is not None else None,
                on_overflow=lambda: abort(request),
                prediction=response.prediction,
            )
            with service.requests.holding(choices, context):
                if events is not None:
                    return await _stream(response, choices, events, config)
                return await _complete(response, choices, service)
    except ConnectionError:
        raise
    except Exception as exc:
        error = _as_error(exc, request[CONTEXT].id, config, expired=timeout.expired())
        if events is not None and events.started:
            context.failed = True
            return await events.fail(error)
        raise error from None
    finally:
        context.num_completion_tokens = choices.num_tokens if choices is not None else 0


async def _begin(
    service: Service,
    llama: Llama,
    prepared: Prepared,
    response_type: type[Response],
    events: EventStream | None,
    cache_scope: bytes,
) -> Response:
    assert llama.tokenizer is not None  # the server does not start without one
    num_top, param = prepared.scored
    scores = None
    if num_top is not None:
        options: dict[str, Any] = {"priority": prepared.request.priority, "cache_scope": cache_scope}
        scoring = asyncio.ensure_future(score_prompts(service, llama, prepared.prompts, num_top, param, **options))
        try:
            while not (await asyncio.wait([scoring], timeout=service.config.sse_keepalive_s))[0]:
                if events is not None:
                    await events.keep_alive()
            scores = await scoring
        finally:
            scoring.cancel()
    return response_type(
        id=f"{response_type.id_prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        fingerprint=service.fingerprint,
        prepared=prepared,
        config=service.config,
        tokenizer=llama.tokenizer,
        scores=scores,
    )


def _as_error(exc: Exception, request_id: str, config: ServerConfig, *, expired: bool) -> ApiError:
    if isinstance(exc, TimeoutError) and expired:
        return timed_out(config.request_timeout_s)
    error = from_exception(exc, request_id)
    if error.status >= 500 and not isinstance(exc, ApiError):
        log_failure(request_id, exc)
    return error


def log_failure(request_id: str, exc: BaseException) -> None:
    """Logs where `exc` was raised. Its message is left out: it may quote a prompt."""
    frames = "".join(traceback.format_tb(exc.__traceback__))
    logger.error("%s failed with %s\n%s", request_id, type(exc).__name__, frames, extra={"request_id": request_id})


async def _complete(response: Response, choices: Choices, service: Service) -> web.Response:
    while not choices.finished:
        await choices.updates(3600.0)
    if response.scores is None:
        body = to_json(response.body(choices))
    else:
        # Megabytes: not on the event loop.
        body = await service.in_worker(lambda: to_json(response.body(choices)))
    return web.Response(body=body, content_type="application/json")


async def _stream(
    response: Response, choices: Choices, events: EventStream, config: ServerConfig
) -> web.StreamResponse:
    options = response.prepared.request.stream_options
    while not choices.finished:
        loop = asyncio.get_running_loop()
        started = loop.time()
        updates = await choices.updates(config.sse_keepalive_s)
        if not updates:
            # Either silence, or tokens that show nothing yet; only the first is worth a comment.
            if loop.time() - started >= config.sse_keepalive_s * 0.99:
                await events.keep_alive()
            continue
        chunks: list[dict[str, Any]] = []
        for update in updates:
            chunks += response.chunks(choices, update)
        await events.send(*chunks)
    if options is not None and options.include_usage:
        await events.send(response.usage_chunk(choices))
    return await events.done()
