"""`POST …/chat/completions`: one request from its body to its last byte."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.context import CONTEXT
from jaxllama_serving.errors import ApiError, from_exception, timed_out
from jaxllama_serving.generation import Choice, Generation, Update
from jaxllama_serving.limits import read_json_body
from jaxllama_serving.prepare import PreparedChat, prepare_chat
from jaxllama_serving.service import SERVICE, Service
from jaxllama_serving.stream import EventStream, abort, to_json

logger = logging.getLogger("jaxllama.serving")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers one chat request, in one piece or as a stream."""
    service = request.app[SERVICE]
    service.ready_llama()
    with service.running():
        body = await read_json_body(request, service.config)
        return await _answer(request, service, body)


async def _answer(request: web.Request, service: Service, body: bytes) -> web.StreamResponse:
    config, context = service.config, request[CONTEXT]
    llama = service.ready_llama()
    generation: Generation | None = None
    events: EventStream | None = None
    timeout = asyncio.timeout(config.request_timeout_s)
    try:
        async with timeout:
            prepared = await service.in_worker(prepare_chat, llama, config, body)
            headers = _headers(request, prepared)
            if prepared.request.stream:
                events = EventStream(request, headers, config.write_timeout_s)
            assert llama.tokenizer is not None  # prepare_chat has refused the rest
            generation = Generation(
                llama.engine,
                llama.tokenizer,
                prepared,
                stop_in_reasoning=config.stop_in_reasoning,
                max_tokens=config.max_stream_tokens if events is not None else None,
                on_overflow=lambda: abort(request),
            )
            reply = Reply.begin(prepared, service)
            context.num_prompt_tokens = len(prepared.prompt_ids)
            with service.generating(generation):
                if events is not None:
                    return await _stream(reply, generation, events, config)
                return await _complete(reply, generation, headers)
    except ConnectionError:
        raise
    except Exception as exc:
        error = _as_error(exc, request[CONTEXT].id, config, expired=timeout.expired())
        if events is not None and events.started:
            return await events.fail(error)
        raise error from None
    finally:
        context.num_completion_tokens = generation.num_tokens if generation is not None else 0


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
    logger.error("%s failed with %s\n%s", request_id, type(exc).__name__, frames)


def _headers(request: web.Request, prepared: PreparedChat) -> dict[str, str]:
    headers: dict[str, str] = dict(request[CONTEXT].headers)
    if prepared.dropped:
        names = ", ".join(name if name.isidentifier() and name.isascii() else "?" for name in prepared.dropped[:8])
        headers["X-Jaxllama-Warning"] = f"ignored unknown parameters: {names[:200]}"
    return headers


async def _complete(reply: Reply, generation: Generation, headers: dict[str, str]) -> web.Response:
    while not generation.finished:
        await generation.updates(3600.0)
    return web.Response(body=to_json(reply.body(generation)), content_type="application/json", headers=headers)


async def _stream(
    reply: Reply, generation: Generation, events: EventStream, config: ServerConfig
) -> web.StreamResponse:
    options = reply.prepared.request.stream_options
    opened: set[int] = set()
    while not generation.finished:
        loop = asyncio.get_running_loop()
        started = loop.time()
        updates = await generation.updates(config.sse_keepalive_s)
        if not updates:
            # Either silence, or tokens that show nothing yet; only the first is worth a comment.
            if loop.time() - started >= config.sse_keepalive_s * 0.99:
                await events.keep_alive()
            continue
        chunks = []
        for update in updates:
            if update.index not in opened:
                opened.add(update.index)
                chunks.append(reply.chunk(generation, update.index, {"role": "assistant", "content": ""}))
            chunks += reply.chunks(generation, update)
        await events.send(*chunks)
    if options is not None and options.include_usage:
        await events.send(reply.usage_chunk(generation))
    return await events.done()


@dataclass(frozen=True)
class Reply:
    """Builds the JSON of one answer: the whole body, or the chunks of a stream."""

    id: str
    created: int
    fingerprint: str
    prepared: PreparedChat
    config: ServerConfig

    @classmethod
    def begin(cls, prepared: PreparedChat, service: Service) -> Reply:
        """Starts an answer: its id and its time."""
        return cls(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), service.fingerprint, prepared, service.config)

    def body(self, generation: Generation) -> dict[str, Any]:
        """Returns the answer in one piece."""
        choices = [self._choice(choice) for choice in generation.choices]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage(generation)}

    def chunks(self, generation: Generation, update: Update) -> list[dict[str, Any]]:
        """Returns an update's chunks: reasoning, content and the end never share one."""
        chunks = []
        if update.reasoning:
            chunks.append(self.chunk(generation, update.index, {"reasoning_content": update.reasoning}))
        if update.content:
            chunks.append(self.chunk(generation, update.index, {"content": update.content}))
        if update.finish_reason is not None:
            last = self.chunk(generation, update.index, {})
            last["choices"][0]["finish_reason"] = update.finish_reason
            last["choices"][0]["stop_reason"] = generation.choices[update.index].stop_reason
            chunks.append(last)
        return chunks

    def chunk(self, generation: Generation, index: int, delta: dict[str, str]) -> dict[str, Any]:
        """Returns one chunk of choice `index`; with continuous_usage_stats it carries the usage so far."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        options = self.prepared.request.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self.usage(generation)
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, generation: Generation) -> dict[str, Any]:
        """Returns the chunk without choices that tells the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(generation)}

    def usage(self, generation: Generation) -> dict[str, Any]:
        """Returns the tokens so far, and their price when prices are set; the prompt counts once for all choices."""
        prompt, completion = len(self.prepared.prompt_ids), generation.num_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": generation.num_reasoning_tokens},
        }
        cost = self.config.cost(prompt, completion)
        if cost is not None:
            usage["estimated_cost"] = cost
        return usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.prepared.request.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.prepared.seed,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.content), "refusal": None}
        if self.prepared.starts_in_reasoning is not None:
            message["reasoning_content"] = "".join(choice.reasoning)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
