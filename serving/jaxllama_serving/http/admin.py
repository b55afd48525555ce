"""`POST /admin/profile`: what the server's operator asks for, off unless a flag turns it on."""

from __future__ import annotations

import asyncio

from aiohttp import web

from jaxllama_serving.http.context import CONTEXT
from jaxllama_serving.http.events import to_json
from jaxllama_serving.http.limits import read_json_body
from jaxllama_serving.protocol.admin import ProfileRequest
from jaxllama_serving.protocol.base import parse, unknown_fields
from jaxllama_serving.protocol.errors import ApiError, unavailable
from jaxllama_serving.protocol.strict_json import decode
from jaxllama_serving.service import SERVICE


async def profile(request: web.Request) -> web.Response:
    """A trace of the next seconds, by JAX's profiler, in a folder of this server's machine; needs `--profile-dir`.

    A client that leaves does not end it.
    """
    service = request.app[SERVICE]
    if service.profiler is None:
        message = "Profiles are off here. The server's flag --profile-dir turns them on."
        raise ApiError(404, message, "not_found", code="profiles_off")
    body = await read_json_body(request, service.config)
    wanted = parse(ProfileRequest, decode(body), strict_fields=service.config.strict_fields)
    if service.max_context is None:
        raise unavailable("The model is still loading.")
    # A thread of its own: the workers prepare requests, which go on meanwhile.
    found = await asyncio.to_thread(service.profiler.record, wanted.seconds)
    if found is None:
        raise ApiError(409, "A profile is being recorded. Ask again when it is done.", code="profile_running")
    request[CONTEXT].ignore(unknown_fields(wanted))
    answer = {"folder": str(found.folder), "seconds": round(found.seconds, 3), "num_bytes": found.num_bytes}
    return web.Response(body=to_json(answer), content_type="application/json")
