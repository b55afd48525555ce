"""The small routes: `/health`, `/ready`, `/version`, `/openapi.json`, `/metrics`, `…/models` and `…/models/{id}`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from jaxllama_serving.metrics import CONTENT_TYPE
from jaxllama_serving.protocol.errors import model_not_found, unavailable
from jaxllama_serving.service import SERVICE, Service
from jaxllama_serving.service import version as package_version

OWNER = "jaxllama"
OPENAPI = web.AppKey("openapi", bytes)


async def health(request: web.Request) -> web.Response:
    """200 while the process is worth keeping, also while it loads; 503 with the reason when the engine has failed."""
    reason = request.app[SERVICE].unhealthy_reason()
    if reason is not None:
        raise unavailable(reason)
    fault = request.app[SERVICE].kernel_fault
    return web.json_response({"status": "ok"} | ({} if fault is None else {"kernel_fault": fault}))


async def ready(request: web.Request) -> web.Response:
    """200 when a request would be taken now, else 503 with the reason."""
    reason = request.app[SERVICE].not_ready_reason()
    if reason is not None:
        raise unavailable(reason)
    return web.json_response({"status": "ready"})


async def version(request: web.Request) -> web.Response:
    """What runs: the package's version, and the fingerprint of build, checkpoint and devices (null while loading)."""
    return web.json_response({"version": package_version(), "system_fingerprint": request.app[SERVICE].fingerprint})


async def metrics(request: web.Request) -> web.Response:
    """Counters, histograms and gauges for Prometheus."""
    return web.Response(body=request.app[SERVICE].metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def openapi(request: web.Request) -> web.Response:
    """This API as OpenAPI 3.1."""
    return web.Response(body=request.app[OPENAPI], content_type="application/json")


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
    config = service.config
    limits: dict[str, float] = {"max_n": config.max_n, "max_body_bytes": config.max_body_bytes}
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": OWNER,
        "limits": limits,
    }
    if service.max_context is not None:
        entry["max_model_len"] = service.max_context
    if config.request_timeout_s is not None:
        limits["request_timeout_s"] = config.request_timeout_s
    if config.price_input is not None or config.price_output is not None:
        entry["pricing"] = {"input": config.price_input or 0.0, "output": config.price_output or 0.0}
    return entry
