"""The chat page: a few static files, read once, served under a policy that lets nothing else in."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from aiohttp import web

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; worker-src 'self'; "
    "img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": ("index.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("api", "chats", "markdown", "settings", "sw", "tokens", "tree", "turns")
    },
}


def add_page(app: web.Application) -> set[web.AbstractResource]:
    """Adds the page's routes and returns their resources, which need no key: the page itself asks for it."""
    folder = resources.files("jaxllama_serving") / "web"
    added: set[web.AbstractResource] = set()
    for path, (name, content_type) in FILES.items():
        route = app.router.add_get(path, _file_handler((folder / name).read_bytes(), content_type))
        assert route.resource is not None
        added.add(route.resource)
    return added


def _file_handler(content: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    etag = hashlib.sha256(content).hexdigest()[:16]
    headers = {
        "Content-Security-Policy": POLICY,
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Cache-Control": "no-cache",
        "ETag": f'"{etag}"',
    }

    async def send(request: web.Request) -> web.Response:
        known = request.if_none_match or ()
        if any(tag.value == etag for tag in known):
            return web.Response(status=304, headers=headers)
        return web.Response(body=content, content_type=content_type, charset="utf-8", headers=headers)

    return send
