"""Bounds on the body that a client sends; those on its framing, the head and the connection lie beside this."""

from __future__ import annotations

import asyncio
from typing import cast

from aiohttp import web

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.connection import Connection
from jaxllama_serving.protocol.errors import ApiError

MAX_BODY_CHUNKS = 10_000
"""A body of honest chunks has far fewer; each costs bookkeeping that its bytes do not pay for."""


async def read_json_body(request: web.Request, config: ServerConfig) -> bytes:
    """Returns the whole body, which must be declared as JSON and uncompressed.

    Raises: ApiError 415 (media type, charset, compression), 413 (too large), 408 (too slow), 400 (cut short).
    """
    _check_media_type(request)
    length = request.content_length
    if length is not None and length > config.max_body_bytes:
        raise _too_large(f"The body has {length} bytes, at most {config.max_body_bytes} are allowed.")
    if not request.body_exists:
        # All such requests share one stream of aiohttp's, whose chunks never end for the second of them.
        return b""
    body, chunks = bytearray(), 0
    framing = cast(Connection, request.protocol).framing
    try:
        async with asyncio.timeout(config.body_timeout_s) as deadline:
            with framing.watching(request.content, deadline):
                framing.check(request.content)
                async for data, _ in request.content.iter_chunks():
                    body += data
                    chunks += 1
                    framing.check(request.content)
                    if len(body) > config.max_body_bytes:
                        raise _too_large(f"The body has more than {config.max_body_bytes} bytes.")
                    if chunks > MAX_BODY_CHUNKS:
                        raise _too_large(f"The body comes in more than {MAX_BODY_CHUNKS} chunks. Send larger ones.")
        framing.check(request.content)
    except TimeoutError:
        framing.check(request.content)
        raise _close(ApiError(408, f"The body took longer than {config.body_timeout_s:g} s.", "timeout")) from None
    except (ApiError, ConnectionError):
        raise
    except Exception:
        # aiohttp's parser fails in many classes on a malformed chunk; all mean that the body cannot be read.
        raise _close(ApiError(400, "The body could not be read to its end.", code="bad_http_request")) from None
    return bytes(body)


def _check_media_type(request: web.Request) -> None:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise _close(ApiError(415, "Compressed bodies are not accepted.", code="unsupported_media_type"))
    if request.content_type != "application/json" or "Content-Type" not in request.headers:
        raise ApiError(
            415,
            "The body must be JSON. Send the header 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "The body must be UTF-8.", code="unsupported_media_type")


def _too_large(message: str) -> ApiError:
    return _close(ApiError(413, message, code="body_too_large"))


def _close(error: ApiError) -> ApiError:
    error.headers = {**error.headers, "Connection": "close"}
    return error
