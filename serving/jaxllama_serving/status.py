"""The small routes: `/health`, `/ready`, `…/models` and `…/models/{id}`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from jaxllama_serving.errors import model_not_found, unavailable
from jaxllama_serving.service import SERVICE, Service

OWNER = "jaxllama"


async def health(request: web.Request) -> web.Response:
    """200 while the process is worth keeping, also while it loads; 503 with the reason when the engine has failed."""
    reason = request.app[SERVICE].unhealthy_reason()
    if reason is not None:
        raise unavailable(reason)
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """200 when a request would be taken now, else 503 with the reason."""
    reason = request.app[SERVICE].not_ready_reason()
    if reason is not None:
        raise unavailable(reason)
    return web.json_response({"status": "ready"})


async def models(request: web.Request) -> web.Response:
    """The names this server answers to."""
    service = request.app[SERVICE]
    return web.json_response({"object": "list", "data": [_entry(service, name) for name in service.config.model_names]})


async def model(request: web.Request) -> web.Response:
    """One of the names; slashes are part of an id."""
    service, name = request.app[SERVICE], request.match_info["id"]
    if name not in service.config.model_names:
        raise model_not_found(name, service.config.model_names)
    return web.json_response(_entry(service, name))


def _entry(service: Service, name: str) -> dict[str, Any]:
    entry = {"id": name, "object": "model", "created": service.started_at, "owned_by": OWNER}
    if service.max_context is not None:
        entry["max_model_len"] = service.max_context
    return entry
