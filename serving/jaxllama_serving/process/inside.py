"""The server's application for this process alone: batches and the terminal's chat ask it as any client would."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.app import make_app
from jaxllama_serving.http.connection import BACKLOG, Listener

if TYPE_CHECKING:
    from jaxllama import Llama


@asynccontextmanager
async def inside_session(llama: Llama, config: ServerConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the application, which listens in a folder that this user alone can enter.

    Any host name reaches it; relative addresses do too.
    """
    app = make_app(llama, config)
    listener = Listener(app, config)
    with tempfile.TemporaryDirectory(prefix="jaxllama-") as folder, socket.socket(socket.AF_UNIX) as sock:
        path = str(Path(folder) / "inside.sock")
        sock.bind(path)
        sock.listen(BACKLOG)
        await listener.start(sock)
        try:
            timeout = aiohttp.ClientTimeout(total=None)
            connector = aiohttp.UnixConnector(path, limit=0)
            async with aiohttp.ClientSession("http://inside", connector=connector, timeout=timeout) as session:
                yield session
        finally:
            await listener.close()
