"""A real server on loopback around a fake model, and the few calls that the tests make of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.app import make_app
from jaxllama_serving.http.connection import Listener, bind
from jaxllama_serving.service import SERVICE, Service

CHAT = "/v1/chat/completions"


def body(**fields: Any) -> dict[str, Any]:
    """A valid chat request with `fields` on top."""
    return {"model": "default", "messages": [{"role": "user", "content": "Hi"}], **fields}


def run[T](test: Coroutine[Any, Any, T], timeout_s: float = 20.0) -> T:
    """Runs one test's coroutine."""
    return asyncio.run(asyncio.wait_for(test, timeout_s))


@dataclass
class Live:
    """A running server and a client session for it."""

    app: web.Application
    url: str
    host: str
    port: int
    session: aiohttp.ClientSession

    @property
    def service(self) -> Service:
        return self.app[SERVICE]

    async def post(self, fields: Any = None, path: str = CHAT, **kwargs: Any) -> tuple[int, Any, Any]:
        """Posts a chat request; returns status, JSON and headers."""
        kwargs = kwargs or {"json": body(**(fields or {}))}
        async with self.session.post(self.url + path, **kwargs) as response:
            return response.status, await response.json(), response.headers

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any, Any]:
        async with self.session.get(self.url + path, **kwargs) as response:
            return response.status, await response.json(), response.headers

    async def events(self, **fields: Any) -> list[Any]:
        """Streams a chat request to its end; returns the data of its events, parsed (`[DONE]` as a string)."""
        async with self.session.post(self.url + CHAT, json=body(stream=True, **fields)) as response:
            assert response.status == 200, await response.text()
            return parse_events(await response.text())

    async def raw(self, data: bytes, *, wait_s: float = 30.0) -> tuple[int, dict[str, str], Any]:
        """Sends bytes as they are; returns the status, the headers (lower case) and the JSON of the first response."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), wait_s)
            status, *lines = head.decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
            text = await reader.readexactly(int(headers.get("content-length", "0")))
            return int(status.split()[1]), headers, json.loads(text) if text else None
        finally:
            writer.close()


def parse_events(text: str) -> list[Any]:
    """The data of each event; comments are left out."""
    found = []
    for event in text.split("\n\n"):
        if event.startswith("data: "):
            data = event.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


@contextlib.asynccontextmanager
async def serving(llama: Any, **config: Any) -> AsyncIterator[Live]:
    """Serves `llama` (None: still loading) on a free port of loopback."""
    settings = ServerConfig(**{"model_names": ("default", "org/model"), "port": 0, **config})
    app = make_app(llama, settings)
    listener = Listener(app, settings)
    sock = bind(settings.host, 0)
    host, port = sock.getsockname()[:2]
    await listener.start(sock)
    try:
        async with aiohttp.ClientSession() as session:
            yield Live(app, f"http://{host}:{port}", host, port, session)
    finally:
        await listener.close()
        if llama is not None:
            llama.close()


@contextlib.contextmanager
def serving_in_thread(llama: Any, **config: Any) -> Iterator[str]:
    """The same for blocking clients: the server runs in a thread; yields its URL."""
    started: threading.Event = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        async with serving(llama, **config) as live:
            found.update(url=live.url, loop=asyncio.get_running_loop(), stop=asyncio.Event())
            started.set()
            await found["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(10)
    try:
        yield found["url"]
    finally:
        found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join(10)


async def until(condition: Any, timeout_s: float = 30.0) -> None:
    """Waits until `condition()` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
