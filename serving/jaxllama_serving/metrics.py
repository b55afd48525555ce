"""`GET /metrics`: the engine's load as gauges in Prometheus's text format, for autoscalers and alarms."""

from __future__ import annotations

from aiohttp import web

from jaxllama_serving.service import SERVICE

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = {
    "jaxllama_ready": "1 when a request would be taken now.",
    "jaxllama_requests_waiting": "Choices that wait for a row.",
    "jaxllama_requests_running": "Choices that have a row.",
    "jaxllama_kv_pages_used": "Pages of the KV cache in use.",
    "jaxllama_kv_pages": "Pages of the KV cache.",
    "jaxllama_compilations": "Programs compiled, or read from the cache on disk. Once ready it stays as it is.",
}
"""Every gauge and what it means. They have no labels. All but the first appear once the model is loaded."""


async def metrics(request: web.Request) -> web.Response:
    """The gauges at this moment.

    Source: Prometheus, "Exposition formats", text format 0.0.4.
    """
    service = request.app[SERVICE]
    values = {"jaxllama_ready": int(service.not_ready_reason() is None)}
    if (stats := service.engine_stats()) is not None:
        values |= {
            "jaxllama_requests_waiting": stats.num_waiting,
            "jaxllama_requests_running": stats.num_running,
            "jaxllama_kv_pages_used": stats.num_pages_used,
            "jaxllama_kv_pages": stats.num_pages,
            "jaxllama_compilations": stats.num_compilations,
        }
    lines = [f"# HELP {name} {GAUGES[name]}\n# TYPE {name} gauge\n{name} {value}\n" for name, value in values.items()]
    return web.Response(body="".join(lines).encode(), headers={"Content-Type": CONTENT_TYPE})
